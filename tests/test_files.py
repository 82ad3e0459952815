"""What is written, whole or not at all."""

import errno
import multiprocessing

import pytest

from denseclip_hf.files import OutputError, complete_or_gone, new_directory, write_atomically


def test_missing_parents_are_made_and_taken_away_again(tmp_path):
    (tmp_path / "p1").mkdir()
    with pytest.raises(OutputError, match="No space"), new_directory(tmp_path / "p1" / "p2" / "p3" / "model"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list((tmp_path / "p1").iterdir()) == []
    with new_directory(tmp_path / "p1" / "p2" / "model"):
        pass
    assert (tmp_path / "p1" / "p2" / "model").is_dir()


def test_what_is_no_fault_of_the_disk_is_not_blamed_on_it(tmp_path):
    """torch raises that a data-loader worker died wherever the main process is."""
    (tmp_path / "part").mkdir()
    with (
        pytest.raises(RuntimeError, match="^DataLoader worker"),
        complete_or_gone(tmp_path / "part", "the checkpoint", "the others"),
    ):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert not (tmp_path / "part").exists()
    with pytest.raises(OSError, match="no room"), complete_or_gone(tmp_path / "part", "the checkpoint", "the others"):
        raise RuntimeError("no room")


def test_a_link_is_refused_before_anything_is_made(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(OutputError, match="link"), new_directory(tmp_path / "link"):
        pytest.fail("it began to write")


def test_an_unwritable_place_is_refused():
    with pytest.raises(OutputError, match="/proc/denseclip/model"), new_directory("/proc/denseclip/model"):
        pass


def test_a_directory_in_use_is_not_touched(tmp_path):
    (tmp_path / "keep").write_text("")
    with pytest.raises(OutputError, match=tmp_path.name), new_directory(tmp_path):
        pass
    assert (tmp_path / "keep").exists()


def test_a_file_is_written_whole_by_many_at_a_time(tmp_path):
    file, text = tmp_path / "recipe.json", "x" * 100_000

    def write():
        for _ in range(50):
            write_atomically(file, text)

    processes = [multiprocessing.get_context("fork").Process(target=write) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert file.read_text() == text and [path.name for path in tmp_path.iterdir()] == ["recipe.json"]

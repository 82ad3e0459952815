"""A model directory to the Hub.

    denseclip push MODEL_DIR USER/NAME [--push] [--public]

Without --push it only shows what would be uploaded. Repositories are private unless --public is given.
"""

import argparse
from pathlib import Path

from .arguments import HelpFormatter, one_sentence_errors


@one_sentence_errors
def main(argv: list[str] | None = None, api=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("model_dir", help="a saved model with its card")
    parser.add_argument("repo_id", help="repository on the Hub, USER/NAME")
    parser.add_argument("--push", action="store_true", help="upload; without it nothing leaves this machine")
    parser.add_argument("--public", action="store_true", help="let everybody see the repository")
    parser.add_argument("--license", help="the Hub's identifier of the license, for the card that is pushed")
    parser.add_argument("--no_code", action="store_true", help="leave out the code that trust_remote_code=True runs")
    parser.add_argument("--include", nargs="*", default=[], help="further files of MODEL_DIR")
    parser.add_argument("--message", default="Upload model", help="of the commit")
    args = parser.parse_args(argv)
    from ..sharing import folder_to_push, push

    with folder_to_push(args.model_dir, not args.no_code, args.include, args.repo_id, args.license) as folder:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        sizes = [path.stat().st_size for path in files]
        for name, size in zip(names, sizes, strict=True):
            print(f"{size:>14,}  {name}")
        left = {path.name for path in Path(args.model_dir).iterdir()} - {name.split("/")[0] for name in names}
        left_out = ", ".join(sorted(left)) or "nothing"
        print(f"{sum(sizes):>14,}  bytes in {len(files)} files; not among them: {left_out}")
        visibility = "public" if args.public else "private"
        if not args.push:
            print(f"Nothing was uploaded. With --push these files go to {args.repo_id} ({visibility}).")
            return
        print(f"Uploaded: {push(folder, args.repo_id, not args.public, args.message, api)}")


if __name__ == "__main__":
    main()

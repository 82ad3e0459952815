"""Other people's checkpoints as model directories, written whole or not at all; no code in them is run.

denseclip convert release denseclip_res50.pth OUTPUT_DIR
denseclip convert catseg model_base.pth OUTPUT_DIR
denseclip convert clip RN50.pt OUTPUT_DIR
denseclip convert clip open_clip_model.safetensors OUTPUT_DIR --hidden_act gelu
"""

import argparse
import json
from pathlib import Path

from ..devices import DTYPES
from ..options import ACTIVATIONS, DEFAULT_CLIP
from .arguments import HelpFormatter, log_to_terminal, one_sentence_errors


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    release = kinds.add_parser("release", help="a DenseCLIP that its authors published", formatter_class=HelpFormatter)
    catseg = kinds.add_parser("catseg", help="a CAT-Seg that its authors published", formatter_class=HelpFormatter)
    clip = kinds.add_parser("clip", help="a CLIP of OpenAI or open_clip", formatter_class=HelpFormatter)
    release.add_argument("checkpoint", help="the released .pth")
    catseg.add_argument("checkpoint", help="the released .pth")
    clip.add_argument("checkpoint", help="OpenAI's .pt as published, a state dict or .safetensors")
    for kind in (release, catseg, clip):
        kind.add_argument("output_dir", help="a new directory")
        kind.add_argument("--tokenizer", default=DEFAULT_CLIP, help="CLIP's, directory or Hub name")
    release.add_argument("--options", help="JSON file: options of the original's model that the checkpoint lacks")
    release.add_argument("--classes", help="JSON file of class names, if the checkpoint has none or others are wanted")
    catseg.add_argument("--classes", help="JSON file of class names to ask for; ADE20K's by default")
    clip.add_argument(
        "--hidden_act",
        choices=ACTIVATIONS,
        help="no weight shows it: gelu for open_clip's models whose name lacks -quickgelu, quick_gelu for others; "
        "only OpenAI's archives do without it",
    )
    clip.add_argument(
        "--num_attention_heads",
        type=int,
        help="of the image tower, where its width does not show them (head size not 64)",
    )
    clip.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the saved weights")
    return parser.parse_args(argv)


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    log_to_terminal()
    options = vars(parse(argv))
    from ..conversion import convert_catseg, convert_clip, convert_release
    from ..files import sha256_of

    kind = options.pop("kind")
    if kind == "clip":
        size = convert_clip(**options).num_parameters()
    elif kind == "catseg":
        size = convert_catseg(**options).num_parameters()
    else:
        if options["options"]:
            options["options"] = json.loads(Path(options["options"]).read_text(encoding="utf-8"))
        size = convert_release(**options).num_parameters()
    print(f"{size / 1e6:.3f} M parameters")
    for file in sorted(Path(options["output_dir"]).iterdir()):
        print(f"sha256 {sha256_of(file)}  {file.name}")
    print(f"The model is in {options['output_dir']}")


if __name__ == "__main__":
    main()

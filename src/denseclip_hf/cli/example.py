"""Write the built-in example: a folder of drawn scenes with masks, and a small CLIP trained contrastively on captions.

denseclip example --output_dir outputs/example --pretraining_steps 600
"""

import argparse
from pathlib import Path

from .arguments import HelpFormatter, log_to_terminal, one_sentence_errors


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/example"), help="of data and CLIP")
    parser.add_argument("--num_train", type=int, default=400, help="training scenes")
    parser.add_argument("--num_val", type=int, default=80, help="held-out scenes")
    parser.add_argument("--vision", choices=["resnet", "vit"], default="resnet", help="image tower of the CLIP")
    parser.add_argument("--pretraining_steps", type=int, default=600, help="0 leaves the CLIP's weights random")
    parser.add_argument("--seed", type=int, default=0, help="of scenes and weights")
    args = parser.parse_args(argv)
    from ..example import make_example_clip, make_example_dataset

    log_to_terminal()
    data = make_example_dataset(args.output_dir / "data", args.num_train, args.num_val, seed=args.seed)
    clip = make_example_clip(args.output_dir / "clip", args.vision, args.seed, args.pretraining_steps)
    print(f"data  {data.resolve()}\nclip  {clip.resolve()}")


if __name__ == "__main__":
    main()

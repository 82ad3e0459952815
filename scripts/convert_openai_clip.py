"""OpenAI's or open_clip's CLIP checkpoint as a transformers directory.

`python scripts/convert_openai_clip.py RN50.pt OUTPUT_DIR [--tokenizer NAME] [--dtype float16]`, or for open_clip's
`python scripts/convert_openai_clip.py open_clip_model.safetensors OUTPUT_DIR --hidden_act gelu`
"""

import argparse

from denseclip_hf.command_line import log_to_terminal
from denseclip_hf.conversion import ACTIVATIONS, DEFAULT_TOKENIZER, convert_clip, sha256_of
from denseclip_hf.devices import DTYPES
from denseclip_hf.training.run_directory import one_sentence_errors


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    log_to_terminal()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="OpenAI's .pt as published, a state dict or .safetensors")
    parser.add_argument("output_dir", help="a new directory, written whole or not at all")
    parser.add_argument("--tokenizer", default=DEFAULT_TOKENIZER, help="CLIP's, directory or Hub name (%(default)s)")
    parser.add_argument(
        "--hidden_act",
        choices=ACTIVATIONS,
        help="no weight shows it: gelu for open_clip's models whose name lacks -quickgelu, quick_gelu for others; "
        "only OpenAI's archives do without it",
    )
    parser.add_argument(
        "--num_attention_heads",
        type=int,
        help="of the image tower, where its width does not show them (head size not 64)",
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the saved weights (%(default)s)")
    args = parser.parse_args(argv)
    model = convert_clip(**vars(args))
    vision = model.config.vision_config
    print(f"{type(model).__name__}: {model.num_parameters() / 1e6:.3f} M parameters, {vision.image_size} pixels")
    print(f"sha256 {sha256_of(f'{args.output_dir}/model.safetensors')}  model.safetensors")


if __name__ == "__main__":
    main()

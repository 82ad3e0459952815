"""The commands, one a file: `denseclip train` is `python -m denseclip_hf.cli.train`.

Flags and recipe files come in; what the rooms below do with them goes to the terminal and into an output directory.
Each file has a `main(argv)`; `arguments` holds what they share.
"""

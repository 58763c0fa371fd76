"""Folds trained adapters into their base model: a folder that loads like the base.

    python recipes/merge.py --adapter runs/gsm8k --output_dir merged

An adapter that went on from another one (`adapter_name_or_path`) contains it: fold in the last one only. Several
adapters are folded in the order given; two that name the same base are refused.
"""

import argparse

from dgrpo.cli import Parser, named, one_line_errors


def main() -> None:
    parser = Parser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--adapter", action="append", type=named, default=[], help="Adapter folder; may be given several times."
    )
    parser.add_argument("--base", type=named, help="Base model; default: what the first adapter was trained on.")
    parser.add_argument("--output_dir", type=named, required=True)
    arguments = parser.parse_args()
    # Imported where the command line is read: `--help` does not wait for torch and its kin.
    from dgrpo.run.merge import merge_adapters

    print(merge_adapters(arguments.adapter, arguments.output_dir, base=arguments.base))


if __name__ == "__main__":
    with one_line_errors():
        main()

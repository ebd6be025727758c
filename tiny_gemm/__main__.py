"""The command tiny-gemm, and python -m tiny_gemm: Ctrl-C is quiet from here on, while cli.py is being imported too."""

import sys


def main() -> None:
    try:
        from tiny_gemm import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

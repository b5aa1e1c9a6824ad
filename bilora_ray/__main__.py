"""`python -m bilora_ray` is the command line `bilora-ray`, where its script is not on the path."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python looks for packages in the current folder first, where any file could be taken for one of them.
    if not sys.flags.safe_path and sys.path[0] != str(Path(__file__).parents[1]):
        del sys.path[0]

    from bilora_ray.cli.main import main

    main()

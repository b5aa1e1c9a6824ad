"""`python -m bilora_ray` is the command line `bilora-ray`, where its script is not on the path."""

from bilora_ray.cli.main import main

if __name__ == "__main__":
    main()

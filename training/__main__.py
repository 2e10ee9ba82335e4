"""`python -m training` is the command `faceprint`, as torchrun starts it: `torchrun -m training train`."""

from retrieval.cli.app import main

if __name__ == "__main__":
    main()

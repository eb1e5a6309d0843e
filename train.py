"""Train a model, or go on training it: python train.py --config=FILE --workdir=DIR."""

from memoryformer.training.__main__ import main

if __name__ == "__main__":
    main()

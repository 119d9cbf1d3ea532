"""`python -m kernels.bench`: see `kernels.bench._harness`, which processes that it starts can import."""

from kernels.bench._harness import main

if __name__ == "__main__":
    main()

"""`python -m cps_hf`, and `accelerate launch -m cps_hf` on several processes."""

from .commands.main import main

if __name__ == "__main__":
    main()

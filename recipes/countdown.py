"""diffu-GRPO on Countdown.

    accelerate launch recipes/countdown.py                               # embedded default, minutes on a CPU
    accelerate launch --config_file recipes/accelerate/zero2_8gpu.yaml recipes/countdown.py \\
        --config recipes/countdown_llada_8b.yaml                         # LLaDA-8B-Instruct, d1's settings

No problem (numbers in whatever order, and target) is both in training and held out.
"""

from dgrpo.run import main
from dgrpo.tasks import countdown

if __name__ == "__main__":
    main(countdown.TASK, __file__)

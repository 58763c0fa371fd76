r"""diffu-GRPO on MATH, evaluated on MATH500.

    accelerate launch recipes/math500.py                                 # embedded default: a smoke run
    accelerate launch --config_file recipes/accelerate/zero2_8gpu.yaml recipes/math500.py \
        --config recipes/math500_llada_8b.yaml                           # LLaDA-8B-Instruct, d1's settings

Answers are compared by math-verify: \\frac{1}{2} equals 0.5.
"""

from dgrpo.run import main
from dgrpo.tasks import math500

if __name__ == "__main__":
    main(math500.TASK, __file__)

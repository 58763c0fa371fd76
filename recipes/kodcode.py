"""diffu-GRPO on programs: KodCode, or rows of HumanEval's, MBPP's or your own form (`dgrpo/tasks/code.py`).

    accelerate launch recipes/kodcode.py                                 # embedded default: a smoke run
    accelerate launch --config_file recipes/accelerate/zero2_8gpu.yaml recipes/kodcode.py \\
        --config recipes/kodcode_llada_8b.yaml                           # LLaDA-8B-Instruct

Programs run in a sandbox (`rewards/sandbox.py`). The file is not called code.py: that would hide Python's own module
of this name from every recipe, and from its debugger.
"""

from dgrpo.run import main
from dgrpo.tasks import code

if __name__ == "__main__":
    main(code.TASK, __file__)

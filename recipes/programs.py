"""diffu-GRPO on programs: KodCode, or rows of HumanEval's, MBPP's or your own form (`dgrpo/tasks/programs.py`).

    accelerate launch recipes/programs.py                                 # embedded default: a smoke run
    accelerate launch --config_file recipes/accelerate/zero2_8gpu.yaml recipes/programs.py \\
        --config recipes/programs_llada_8b.yaml                           # LLaDA-8B-Instruct

Programs run in a sandbox (`rewards/sandbox`).
"""

from dgrpo.run import main
from dgrpo.tasks import programs

if __name__ == "__main__":
    main(programs.TASK, __file__)

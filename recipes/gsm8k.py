"""diffu-GRPO on GSM8K.

    accelerate launch recipes/gsm8k.py                                   # embedded default, minutes on a CPU
    accelerate launch --config_file recipes/accelerate/zero2_8gpu.yaml recipes/gsm8k.py \\
        --config recipes/gsm8k_llada_8b.yaml                             # LLaDA-8B-Instruct, d1's settings

Any setting of the YAML can be given on the command line: --learning_rate 1e-6 --num_iterations 4.
"""

from dgrpo.run import main
from dgrpo.tasks import gsm8k

if __name__ == "__main__":
    main(gsm8k.TASK, __file__)

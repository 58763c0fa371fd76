"""diffu-GRPO on Sudoku.

    accelerate launch recipes/sudoku.py                                  # embedded default, minutes on a CPU
    accelerate launch --config_file recipes/accelerate/zero2_8gpu.yaml recipes/sudoku.py \\
        --config recipes/sudoku_llada_8b.yaml --dataset 4x4_sudoku_unique_puzzles.csv   # LLaDA-8B-Instruct

Puzzles are split by solution: no filled grid is both in training and held out.
"""

from dgrpo.run import main
from dgrpo.tasks import sudoku

if __name__ == "__main__":
    main(sudoku.TASK, __file__)

"""diffu-GRPO on any dataset, with rewards of your own.

    accelerate launch recipes/grpo.py --dataset rows.csv --prompt_column Question --answer_column Result \\
        --reward_funcs my_rewards:mine                                  # the embedded model, minutes on a CPU
    accelerate launch --config_file recipes/accelerate/zero2_8gpu.yaml recipes/grpo.py \\
        --config recipes/grpo_llada_8b.yaml --dataset openai/gsm8k:main --prompt_column question \\
        --answer_column answer --reward_funcs my_rewards:mine           # LLaDA-8B-Instruct, d1's settings

A dataset is a file (.csv, .jsonl, .json, .parquet), a dataset of the hub (NAME:CONFIG@SPLIT, slices too) or several
joined by ` + `. The prompt's column holds texts or messages. Rewards get every column by its name, and the answer's
as `answer`; a share of the prompts is held out, on which the rewards' mean is the score.
"""

from dgrpo.run import main
from dgrpo.run.own_data import OwnDataRecipeConfig, recipe_task

if __name__ == "__main__":
    main(recipe_task, __file__, OwnDataRecipeConfig)

"""diffu-GRPO on GSM8K.

    accelerate launch recipes/gsm8k.py                                         # embedded default, minutes on a CPU
    accelerate launch --config_file recipes/accelerate/zero2_8gpu.yaml recipes/gsm8k.py \\
        --config recipes/gsm8k_llada_8b.yaml                                   # LLaDA-8B-Instruct, d1's settings

Any setting of the YAML can be given on the command line: --learning_rate 1e-6 --num_iterations 4.
"""

from dgrpo import DiffuGRPOTrainer
from dgrpo.run import parse_recipe, prepare_model, rewards_of, train
from dgrpo.tasks import gsm8k, load_rows


def main() -> None:
    recipe, args, model_config = parse_recipe(__file__)
    train_rows, held_out = load_rows(
        gsm8k.TASK,
        recipe.dataset,
        recipe.eval_dataset,
        num_train=recipe.num_train_problems,
        num_held_out=recipe.num_eval_problems,
        instruction=recipe.instruction,
        seed=args.seed,
    )
    model, tokenizer, peft_config = prepare_model(gsm8k.TASK, recipe, args, model_config)
    trainer = DiffuGRPOTrainer(
        model=model,
        processing_class=tokenizer,
        args=args,
        peft_config=peft_config,
        train_dataset=train_rows,
        reward_funcs=rewards_of(recipe),
    )
    train(trainer, gsm8k.TASK, held_out, recipe, model_config.model_name_or_path)


if __name__ == "__main__":
    main()

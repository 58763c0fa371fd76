"""What a long run needs whatever it learns: whole checkpoints, exact resuming, guards, rewards that cannot end it."""

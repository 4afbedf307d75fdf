"""How good a drafter is: accepted length, the prompts for it, plots."""

"""Looking at an intervention: heat maps, and its direct effect on the logits."""

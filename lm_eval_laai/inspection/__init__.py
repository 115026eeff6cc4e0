"""Looking at an intervention: heat maps, and the words it promotes and suppresses."""

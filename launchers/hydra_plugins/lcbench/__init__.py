"""Hydra plugins of lcbench: the sweeper that makes a plan, and the launchers that bring its packs to processes."""

"""The train loop, its engine protocol, checkpoints and metric spool."""

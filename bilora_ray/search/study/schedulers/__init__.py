"""When a trial is stopped early: a file a scheduler."""

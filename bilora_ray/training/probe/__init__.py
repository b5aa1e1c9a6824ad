"""What a base model does with a row, found by one look: whatever its files say, and before a trial has spent a step."""

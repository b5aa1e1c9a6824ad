"""What leaves the house: an adapter as PEFT and the Hub take it, or a model with one merged in."""

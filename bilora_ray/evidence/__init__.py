"""What runs of several methods say of each other: statistics, words and a picture. No torch, no Ray, no database."""

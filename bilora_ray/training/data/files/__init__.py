"""What the bytes of files say, as rows."""

"""What ends a search before its trials are done, and how a person steers one that runs: all in the study database."""

"""What `import bilora_ray` gives. The verbs of the command line stand on the same functions."""

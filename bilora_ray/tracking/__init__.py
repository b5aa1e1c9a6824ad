"""Every study and trial in MLflow. Knows only settings and errors; the search calls it."""

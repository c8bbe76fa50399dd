"""Scripts that start training on a cluster, written from the templates in launch/templates/."""

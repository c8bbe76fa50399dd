"""One module for each group of commands; `trainer.cli` names them all."""

#!/usr/bin/env bash
# {{config}} on {{nodes}} node(s) with {{processes}} process(es) each, by torchrun.
# Written by: {{command}}
#
# Start it on every node at about the same time. Each is told which one it is, and where node 0 is:
#
#     NODE_RANK=0 MASTER_ADDR=<address of node 0> bash {{out}}
#
# From one machine over ssh, for hosts that all see this folder:
#
#     hosts=(first second)
#     for rank in "${!hosts[@]}"; do
#         ssh "${hosts[rank]}" "NODE_RANK=$rank MASTER_ADDR=${hosts[0]} bash {{out}}" &
#     done
#     wait
#
# Ends on each node with 0 (finished, or stopped with a checkpoint), 2 (refused) or 70 (failed).
# SIGTERM to it on any node asks for a stop. The same again goes on from the newest checkpoint.
set -euo pipefail

# Relative paths, in the configuration too, are seen from here.
cd {{folder}}
export PYTHON=${PYTHON:-{{python}}}

settings=(
    --nodes {{nodes}}
    # Of a node: one for each GPU.
    --processes {{processes}}
    # Has to be free on node 0.
    --port {{port}}
    # Seconds for which the first node waits until the last one is up.
    --patience {{patience}}
)
# The configuration, and what is set on top of it.
arguments=(
{{arguments}}
)
exec bash {{checkout}}/launch/torchrun.sh "${settings[@]}" "${arguments[@]}" "$@"

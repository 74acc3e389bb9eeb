#!/bin/sh
# Healthy is whoever trains, starts, or is no run at all; a run that hangs or is dead is not.
out=$(sed -n 's/^ *"out": "\(.*\)"$/\1/p' /tmp/epmoe-launch-*/run.json 2>/dev/null | head -n 1)
[ -z "$out" ] || exec epmoe doctor "$out"

"""Wires the stages: the pipeline, its Prefect flows, its Dask map, its report and the command line."""

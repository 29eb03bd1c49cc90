"""Wires the stages: pipeline, Prefect flows, Dask map, report and command line."""

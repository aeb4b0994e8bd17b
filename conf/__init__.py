"""hydra's configuration groups; the YAML files beside this one."""

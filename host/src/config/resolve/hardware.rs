//! A description of machines to a [`HardwarePlan`].

use super::super::Config;
use super::super::plan::HardwarePlan;
use super::super::registry::keys::HARDWARE;
use super::super::section::{Found, Reader};
use super::resolve;
use crate::error::Result;

pub fn hardware(config: &Config) -> Result<HardwarePlan> {
    Ok(resolve(config, HARDWARE, |reader, _| build(reader))?.plan)
}

pub(super) fn build(reader: &Reader<'_>) -> Found<HardwarePlan> {
    let root = reader.root("hardware", HARDWARE);
    Ok(HardwarePlan {
        name: root.get("name")?,
        is_cpu: root.get::<String>("device")? == "cpu",
        devices_per_node: root.get("devices_per_node")?,
        memory_gb: root.get("memory_gb")?,
        host_memory_gb: root.get("host_memory_gb")?,
        tflops: root.get("tflops")?,
        link_gb_s: root.get("link_gb_s")?,
        node_link_gb_s: root.get("node_link_gb_s")?,
        disk_gb_s: root.get("disk_gb_s")?,
    })
}

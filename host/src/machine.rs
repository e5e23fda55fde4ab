//! What the machine is, as `/proc`, `/sys` and `/dev` tell it: processor, memory, GPUs.
//!
//! No driver, no vendor library, no libtorch: `doctor` has to work where one of them is what is broken. Every function
//! takes the root to read under, so that tests can show it machines we do not have.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// Processor features that decide how fast libtorch multiplies; names as in `/proc/cpuinfo`.
pub const FEATURES: [&str; 5] = ["avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16"];

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cpu {
    pub model: String,
    /// Physical cores that this process may use.
    pub cores: usize,
    /// Hardware threads that this process may use.
    pub threads: usize,
    /// Those of [`FEATURES`] it has.
    pub features: Vec<&'static str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Memory {
    pub total: u64,
    pub available: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Vendor {
    Amd,
    Nvidia,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Gpu {
    pub vendor: Vendor,
    pub name: String,
    /// NVIDIA's driver tells it to its own library only.
    pub memory_total: Option<u64>,
}

/// The device file a vendor's programs talk to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DriverNode {
    pub path: PathBuf,
    pub exists: bool,
    pub accessible: bool,
}

/// Returns how many cores this process may keep busy with arithmetic: a core's second thread adds nothing to it.
pub fn usable_cores() -> usize {
    cpu(Path::new("/")).cores
}

pub fn cpu(root: &Path) -> Cpu {
    let text = read(root, "proc/cpuinfo");
    // Affinity and container quota; 1 where even that cannot be told.
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let flags: BTreeSet<&str> = field(&text, "flags").unwrap_or_default().split_whitespace().collect();
    let features = FEATURES.into_iter().filter(|feature| flags.contains(feature)).collect();
    let model = field(&text, "model name").unwrap_or("unknown").to_owned();
    let cores = match physical_cores(&text) {
        0 => threads,
        cores => cores.min(threads),
    };
    Cpu { model, cores, threads, features }
}

/// Counts distinct cores among the processors this process may run on; 0 where `/proc/cpuinfo` does not tell.
fn physical_cores(cpuinfo: &str) -> usize {
    let allowed = rustix::thread::sched_getaffinity(None).ok();
    let mut cores = BTreeSet::new();
    for block in cpuinfo.split("\n\n") {
        let number = field(block, "processor").and_then(|number| number.parse::<usize>().ok());
        let place = field(block, "physical id").zip(field(block, "core id"));
        let (Some(number), Some(place)) = (number, place) else { continue };
        let in_set = number < rustix::thread::CpuSet::MAX_CPU;
        if allowed.as_ref().is_none_or(|allowed| in_set && allowed.is_set(number)) {
            cores.insert(place);
        }
    }
    cores.len()
}

/// Returns the machine's memory, or less where a container's limit is lower.
pub fn memory(root: &Path) -> Option<Memory> {
    let text = read(root, "proc/meminfo");
    let bytes = |name| Some(field(&text, name)?.strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024);
    let memory = Memory { total: bytes("MemTotal")?, available: bytes("MemAvailable")? };
    let number = |path| read(root, path).trim().parse::<u64>().ok();
    let limits = [
        ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ];
    let limited = limits.iter().find_map(|(limit, usage)| Some((number(limit)?, number(usage)?)));
    Some(match limited {
        Some((limit, usage)) if limit < memory.total => {
            Memory { total: limit, available: memory.available.min(limit.saturating_sub(usage)) }
        }
        _ => memory,
    })
}

/// Returns the GPUs that a driver has taken charge of.
pub fn gpus(root: &Path) -> Vec<Gpu> {
    let mut gpus = amd_gpus_of_kfd(root);
    if gpus.is_empty() {
        gpus = amd_gpus_of_drm(root);
    }
    gpus.extend(nvidia_gpus(root));
    gpus
}

/// The device file that programs of `vendor` open first.
pub fn driver_node(root: &Path, vendor: Vendor) -> DriverNode {
    let name = match vendor {
        Vendor::Amd => "dev/kfd",
        Vendor::Nvidia => "dev/nvidiactl",
    };
    let on_disk = root.join(name);
    let accessible = rustix::fs::access(&on_disk, rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK).is_ok();
    DriverNode { path: Path::new("/").join(name), exists: on_disk.exists(), accessible }
}

/// ROCm's own list of compute devices; processors are in it too, without SIMD units.
fn amd_gpus_of_kfd(root: &Path) -> Vec<Gpu> {
    let mut gpus = vec![];
    for node in folders(&root.join("sys/class/kfd/kfd/topology/nodes")) {
        let properties = read(&node, "properties");
        if property(&properties, "simd_count").unwrap_or(0) == 0 {
            continue;
        }
        let banks = folders(&node.join("mem_banks"));
        let memory: u64 = banks.iter().filter_map(|bank| property(&read(bank, "properties"), "size_in_bytes")).sum();
        let minor = property(&properties, "drm_render_minor").unwrap_or(0);
        let device = root.join(format!("sys/class/drm/renderD{minor}/device"));
        let product = read(&device, "product_name").trim().to_owned();
        let name = match (product.is_empty(), property(&properties, "gfx_target_version")) {
            (false, _) => product,
            (true, Some(version)) => format!("AMD GPU {}", gfx_name(version)),
            (true, None) => "AMD GPU".to_owned(),
        };
        gpus.push(Gpu { vendor: Vendor::Amd, name, memory_total: (memory > 0).then_some(memory) });
    }
    gpus
}

/// 90402 is gfx942: major, minor and stepping, the last two as hexadecimal digits.
fn gfx_name(version: u64) -> String {
    format!("gfx{}{:x}{:x}", version / 10_000, version / 100 % 100, version % 100)
}

fn amd_gpus_of_drm(root: &Path) -> Vec<Gpu> {
    let mut gpus = vec![];
    for card in folders(&root.join("sys/class/drm")) {
        // `card0` is a device, `card0-DP-1` one of its sockets.
        let name = card.file_name().unwrap_or_default().to_string_lossy();
        let is_card = name.strip_prefix("card").is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_digit()));
        let device = card.join("device");
        if !is_card || read(&device, "vendor").trim() != "0x1002" {
            continue;
        }
        let product = read(&device, "product_name").trim().to_owned();
        gpus.push(Gpu {
            vendor: Vendor::Amd,
            name: if product.is_empty() { "AMD GPU".to_owned() } else { product },
            memory_total: read(&device, "mem_info_vram_total").trim().parse().ok(),
        });
    }
    gpus
}

fn nvidia_gpus(root: &Path) -> Vec<Gpu> {
    let gpu = |name: String| Gpu { vendor: Vendor::Nvidia, name, memory_total: None };
    let named: Vec<Gpu> = folders(&root.join("proc/driver/nvidia/gpus"))
        .iter()
        .map(|folder| gpu(field(&read(folder, "information"), "Model").unwrap_or("NVIDIA GPU").to_owned()))
        .collect();
    if !named.is_empty() {
        return named;
    }
    // A container may hide /proc/driver and still pass the devices: nvidia0, nvidia1, ...
    let devices = entries(&root.join("dev")).into_iter().filter(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.strip_prefix("nvidia")
            .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit()))
    });
    devices.map(|_| gpu("NVIDIA GPU".to_owned())).collect()
}

/// The first value of `name` in lines of `name : value`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

/// The value of `name` in lines of `name value`.
fn property(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

/// Empty where the file is not there: every machine lacks some of them.
fn read(root: &Path, path: &str) -> String {
    std::fs::read_to_string(root.join(path)).unwrap_or_default()
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<PathBuf> =
        std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    // By length, then name: `card2` before `card10`.
    entries.sort_by_key(|path| (path.as_os_str().len(), path.clone()));
    entries
}

fn folders(folder: &Path) -> Vec<PathBuf> {
    entries(folder).into_iter().filter(|path| path.is_dir()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn this_machine_has_a_processor_and_memory() {
        let cpu = cpu(Path::new("/"));
        assert!(1 <= cpu.cores && cpu.cores <= cpu.threads, "{cpu:?}");
        let memory = memory(Path::new("/")).unwrap();
        assert!(0 < memory.available && memory.available <= memory.total, "{memory:?}");
    }

    #[test]
    fn two_threads_of_a_core_count_once() {
        let block =
            |number, core| format!("processor\t: {number}\nphysical id\t: 0\ncore id\t\t: {core}\nflags : avx2\n");
        let allowed = rustix::thread::sched_getaffinity(None).unwrap();
        let cpus: Vec<usize> = (0..rustix::thread::CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect();
        let same: Vec<String> = cpus.iter().map(|cpu| block(*cpu, 7)).collect();
        assert_eq!(physical_cores(&same.join("\n")), 1);
        let own: Vec<String> = cpus.iter().map(|cpu| block(*cpu, *cpu)).collect();
        assert_eq!(physical_cores(&own.join("\n")), cpus.len());
    }

    #[test]
    fn a_container_limit_below_the_machine_counts() {
        let meminfo = ("proc/meminfo", "MemTotal:  8000 kB\nMemFree: 1 kB\nMemAvailable:  6000 kB\n");
        let limited =
            tree(&[meminfo, ("sys/fs/cgroup/memory.max", "4096000\n"), ("sys/fs/cgroup/memory.current", "96000\n")]);
        assert_eq!(memory(limited.path()), Some(Memory { total: 4_096_000, available: 4_000_000 }));
        let free = tree(&[meminfo, ("sys/fs/cgroup/memory.max", "max\n"), ("sys/fs/cgroup/memory.current", "96000\n")]);
        assert_eq!(memory(free.path()), Some(Memory { total: 8_192_000, available: 6_144_000 }));
    }

    #[test]
    fn amd_gpus_come_from_rocm_or_else_from_the_cards() {
        let node = "sys/class/kfd/kfd/topology/nodes";
        let rocm = tree(&[
            (&format!("{node}/0/properties"), "cpu_cores_count 64\nsimd_count 0\n"),
            (&format!("{node}/1/properties"), "simd_count 416\ngfx_target_version 90010\ndrm_render_minor 128\n"),
            (&format!("{node}/1/mem_banks/0/properties"), "heap_type 1\nsize_in_bytes 68702699520\n"),
            ("sys/class/drm/card0/device/vendor", "0x1002\n"),
        ]);
        let gpu = Gpu { vendor: Vendor::Amd, name: "AMD GPU gfx90a".into(), memory_total: Some(68_702_699_520) };
        assert_eq!(gpus(rocm.path()), [gpu]);

        let cards = tree(&[
            ("sys/class/drm/card0/device/vendor", "0x1002\n"),
            ("sys/class/drm/card0/device/mem_info_vram_total", "34342961152\n"),
            ("sys/class/drm/card0/device/product_name", "AMD Radeon PRO W7800\n"),
            ("sys/class/drm/card0-DP-1/device/vendor", "0x1002\n"),
            ("sys/class/drm/card1/device/vendor", "0x8086\n"),
        ]);
        let gpu = Gpu { vendor: Vendor::Amd, name: "AMD Radeon PRO W7800".into(), memory_total: Some(34_342_961_152) };
        assert_eq!(gpus(cards.path()), [gpu]);
        assert_eq!(gfx_name(90402), "gfx942");
        assert_eq!(gfx_name(110_000), "gfx1100");
    }

    #[test]
    fn nvidia_gpus_come_from_the_driver_or_else_from_the_device_files() {
        let gpu = |name: &str| Gpu { vendor: Vendor::Nvidia, name: name.into(), memory_total: None };
        let driver = "proc/driver/nvidia/gpus";
        let full = tree(&[
            (&format!("{driver}/0000:19:00.0/information"), "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 1\n"),
            ("dev/nvidia0", ""),
        ]);
        assert_eq!(gpus(full.path()), [gpu("NVIDIA H100 80GB HBM3")]);
        let devices = tree(&[("dev/nvidia0", ""), ("dev/nvidia1", ""), ("dev/nvidiactl", ""), ("dev/nvidia-uvm", "")]);
        assert_eq!(gpus(devices.path()), [gpu("NVIDIA GPU"), gpu("NVIDIA GPU")]);
    }
}

use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::libtorch::Source;

/// A machine on which everything is right.
fn healthy() -> Facts {
    let driver = |path: &str| DriverNode { path: path.into(), exists: true, accessible: true };
    Facts {
        version: "0.1.0",
        program: Some("/opt/host/host".into()),
        worker: Ok("/opt/host/host-rank".into()),
        libtorch: Ok(Libtorch {
            lib_dir: "/opt/torch/lib".into(),
            version: "2.11.0+rocm7.0".into(),
            source: Source::Environment,
            back_ends: vec![BackEnd::Cpu, BackEnd::Rocm],
        }),
        probe: Ok(Probe {
            version: Some("0.1.0".into()),
            sdk_version: Some("0.1.0".into()),
            libtorch_version: "2.11.0".into(),
            cpu_capability: "AVX512".into(),
            threads: 64,
            isolation: vec!["seccomp".into(), "landlock".into()],
            devices: vec![ProbedDevice { index: 0, library: "libtorch_hip.so".into(), memory_total: Some(64 << 30) }],
        }),
        cpu: Cpu { model: "EPYC".into(), cores: 64, threads: 128, features: vec!["avx2", "avx512f", "avx512_bf16"] },
        memory: Some(Memory { total: 512 << 30, available: 500 << 30 }),
        gpus: vec![Gpu { vendor: Vendor::Amd, name: "AMD Instinct MI210".into(), memory_total: Some(64 << 30) }],
        amd_driver: driver("/dev/kfd"),
        nvidia_driver: driver("/dev/nvidiactl"),
        omp_num_threads: None,
        group: Ok(None),
    }
}

fn findings(change: impl FnOnce(&mut Facts)) -> Vec<String> {
    let mut facts = healthy();
    change(&mut facts);
    examine(&facts).iter().map(Finding::to_string).collect()
}

fn only_finding(change: impl FnOnce(&mut Facts)) -> String {
    let findings = findings(change);
    assert_eq!(findings.len(), 1, "{findings:?}");
    findings.into_iter().next().unwrap()
}

#[test]
fn a_healthy_machine_is_described_without_findings() {
    assert_eq!(findings(|_| {}), Vec::<String>::new());
    insta::assert_snapshot!(healthy(), @"
    host       0.1.0, /opt/host/host
    host-rank  0.1.0, /opt/host/host-rank
    guests     host:sdk 0.1.0
    limits     limits.guest_mb=10 limits.memory_mb=256 limits.tensors_mb=32768 limits.handles=20000
               limits.hostcall_mb=32 limits.compile_mb=2048 limits.compile_seconds=60.0 limits.log_lines=10000
               limits.memories=4 limits.instances=64 limits.tables=32 limits.table_elements=100000
               limits.operations=10000000000 limits.seconds=30.0
               components: 512 KiB of stack, 32 in each other, log lines of 1024 bytes
               scripts: 1024 KiB long, strings of memory_mb / 256, arrays of 65536, maps of 4096, 32 calls and 64 expressions deep (32 in functions), 256 variables, 256 functions
    libtorch   2.11.0+rocm7.0 (from `LIBTORCH`), /opt/torch/lib
    back ends  cpu, rocm
    processor  EPYC, 64 cores, 128 threads, avx2 avx512f avx512_bf16
    kernels    AVX512, 64 threads
    isolation  seccomp, landlock
    memory     512.0 GiB, 500.0 GiB free
    GPU        AMD Instinct MI210, 64.0 GiB
    cuda:0     libtorch_hip.so, 64.0 GiB
    ");
}

#[test]
fn missing_parts_are_errors() {
    let findings = findings(|facts| {
        facts.libtorch = Err(Error::config("no libtorch found").hint("run `cargo xtask setup`"));
        facts.worker = Err(Error::config("no worker program at `host-rank`"));
        facts.probe = Err(None);
    });
    assert_eq!(
        findings,
        ["error: no libtorch found\nhint: run `cargo xtask setup`", "error: no worker program at `host-rank`"]
    );
}

#[test]
fn a_worker_of_another_build_or_libtorch_is_an_error() {
    let other_build = only_finding(|facts| {
        facts.probe.as_mut().unwrap().version = Some("0.2.0".into());
    });
    assert!(other_build.starts_with("error: `host` is version 0.1.0, but `host-rank` beside it is 0.2.0\n"));
    let other_libtorch = only_finding(|facts| {
        facts.probe.as_mut().unwrap().libtorch_version = "2.10.0".into();
    });
    assert!(other_libtorch.starts_with("error: the worker loaded libtorch 2.10.0, not the 2.11.0+rocm7.0 found at"));
}

#[test]
fn a_gpu_that_cannot_be_used_is_a_warning_with_its_reason() {
    let no_half = only_finding(|facts| facts.libtorch.as_mut().unwrap().back_ends = vec![BackEnd::Cpu]);
    assert!(no_half.starts_with("warning: 1 AMD GPU(s) here cannot be used\ncause: this libtorch has no ROCm half\n"));
    let no_driver = only_finding(|facts| facts.amd_driver.exists = false);
    assert!(no_driver.contains("cause: `/dev/kfd` does not exist\nhint: load the AMD driver"), "{no_driver}");
    let no_access = only_finding(|facts| facts.amd_driver.accessible = false);
    assert!(no_access.contains("cause: `/dev/kfd` may not be opened by this user\nhint: add yourself"), "{no_access}");
    let unseen = only_finding(|facts| facts.probe.as_mut().unwrap().devices.clear());
    assert!(unseen.contains("cause: libtorch's ROCm half found no device"), "{unseen}");
}

#[test]
fn what_makes_a_run_slow_is_a_warning() {
    if cfg!(target_arch = "x86_64") {
        let no_bf16 = only_finding(|facts| facts.cpu.features = vec!["avx2"]);
        assert!(no_bf16.starts_with("warning: the processor, EPYC, has no bf16 instructions"), "{no_bf16}");
    }
    let full = only_finding(|facts| facts.memory.as_mut().unwrap().available = 1 << 30);
    assert!(full.starts_with("warning: only 1.0 GiB of 512.0 GiB memory is free\n"), "{full}");
    let few_threads = only_finding(|facts| {
        facts.omp_num_threads = Some("1".into());
        facts.probe.as_mut().unwrap().threads = 1;
    });
    assert!(few_threads.starts_with("warning: `OMP_NUM_THREADS=1` leaves libtorch 1 thread(s) on 64 cores\n"));
}

#[test]
fn an_environment_with_a_rank_is_told() {
    let group = GroupVars { rank: 1, world_size: 4, ..GroupVars::default() };
    let joins = only_finding(|facts| facts.group = Ok(Some(group)));
    assert!(
        joins.starts_with("warning: `host run` here joins a group: `RANK=1` of `WORLD_SIZE=4` is set\n"),
        "{joins}"
    );
    let half = only_finding(|facts| facts.group = Err(Error::config("`RANK` is set, but `WORLD_SIZE` is not")));
    assert!(half.starts_with("error: `RANK` is set"), "{half}");
}

#[test]
fn json_holds_the_facts_and_nulls_for_what_is_missing() {
    let mut facts = healthy();
    facts.worker = Err(Error::config("no worker"));
    let json = serde_json::to_value(&facts).unwrap();
    assert_eq!((&json["worker"], &json["group"]), (&serde_json::Value::Null, &serde_json::Value::Null));
    assert_eq!(json["libtorch"]["back_ends"], serde_json::json!(["cpu", "rocm"]));
    assert_eq!(json["probe"]["devices"][0]["memory_total"], 64u64 << 30);
}

/// Runs a shell script in the worker's place.
fn probe_of(script: &str, limit: Duration) -> Result<Probe> {
    let folder = tempfile::tempdir().unwrap();
    let worker = folder.path().join("worker");
    std::fs::write(&worker, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&worker, std::fs::Permissions::from_mode(0o755)).unwrap();
    probe(&worker, Path::new("/opt/torch/lib"), limit)
}

#[test]
fn a_probe_is_read_or_its_failure_told() {
    const LONG: Duration = Duration::from_secs(20);
    let answer = r#"{"libtorch_version":"2.11.0","cpu_capability":"AVX2","threads":2,"devices":[]}"#;
    let good = probe_of(
        &format!(r#"test "$1" = --probe && test "$HOST_LIBTORCH" = /opt/torch/lib && echo noise && echo '{answer}'"#),
        LONG,
    );
    assert_eq!((good.as_ref().unwrap().threads, good.unwrap().version), (2, None));

    let no_library = probe_of("echo 'libc10.so: cannot open shared object file' >&2; exit 127", LONG).unwrap_err();
    assert!(no_library.message.ends_with("failed its probe, exit status: 127"), "{no_library}");
    assert_eq!(no_library.causes, ["libc10.so: cannot open shared object file"]);

    let silent = probe_of("exit 0", LONG).unwrap_err();
    assert!(silent.message.ends_with("answered its probe with no line of JSON"), "{silent}");
    let other = probe_of("echo '{}'", LONG).unwrap_err();
    assert_eq!(other.causes, ["missing field `libtorch_version` at line 1 column 2"]);

    let start = Instant::now();
    let hung = probe_of("exec sleep 30", Duration::from_millis(200)).unwrap_err();
    assert!(hung.message.ends_with("gave no answer to `--probe` in 0.2 s"), "{hung}");
    assert!(start.elapsed() < Duration::from_secs(10));
}

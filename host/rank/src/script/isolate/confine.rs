//! What the process of a template gives up before it sees a byte of the guest, and cannot have back.
//!
//! Memory is limited by `RLIMIT_DATA`, which counts what can be written to. `RLIMIT_AS` would count the gigabytes of address
//! space that wasmtime reserves for each memory and never touches. Shared memory, which `RLIMIT_DATA` does not count, cannot
//! be had.
//!
//! Of system calls, what allocates, waits, and reads and writes the two pipes is let through. The rest does not exist
//! (`ENOSYS`): the runtime, and another C library than the one this was tried with, then do without. What only somebody who
//! has broken out of the engine would ask for ends the process, so that it is heard of.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetError, RulesetStatus, Scope};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Length, SeccompCmpOp as Is, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// What the kernel may have to hold a process, by the names people know.
const LAYERS: [&str; 2] = ["seccomp", "landlock"];

/// What the process needs besides the guest's memory, in MiB: the compiler, and rows on their way.
const OWN_MEMORY_MB: usize = 256;
/// Of its last words, which go to a file that is memory.
const LAST_WORDS_BYTES: u64 = 64 << 10;
/// Its three, and one for what the kernel is asked with.
const MAX_FILES: u64 = 8;

static CONFINED: AtomicBool = AtomicBool::new(false);

/// Whether this process serves a template and has no files, so no cache either.
pub fn is_confined() -> bool {
    CONFINED.load(Ordering::Relaxed)
}

/// Limits this process to `memory_mb` for its guest, no core file, and no files but those it has.
pub(super) fn limit_resources(memory_mb: usize) -> io::Result<()> {
    CONFINED.store(true, Ordering::Relaxed);
    let memory = data_bytes()?.saturating_add(((memory_mb + OWN_MEMORY_MB) as u64) << 20);
    let limits = [
        (Resource::Data, memory),
        (Resource::Core, 0),
        (Resource::Fsize, LAST_WORDS_BYTES),
        (Resource::Nofile, MAX_FILES),
        (Resource::Memlock, 0),
    ];
    limits.into_iter().try_for_each(|(resource, most)| {
        // The user may have set a lower one, which cannot be raised.
        let most = getrlimit(resource).maximum.unwrap_or(most).min(most);
        setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) }).map_err(io::Error::from)
    })
}

/// What `RLIMIT_DATA` counts, of the libraries that are there before anything is done.
fn data_bytes() -> io::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmData:")?.trim().strip_suffix("kB"));
    let kib: Option<u64> = kib.and_then(|kib| kib.trim().parse().ok());
    kib.map(|kib| kib << 10).ok_or_else(|| io::Error::other("`/proc/self/status` says nothing of `VmData`"))
}

/// Takes files, network and most system calls from this thread and those it will start, for good. Returns which of
/// [`LAYERS`] the kernel does not have.
pub(super) fn confine() -> Vec<&'static str> {
    let _ = rustix::thread::set_no_new_privs(true);
    let has_landlock = matches!(restrict_files(), Ok(status) if status != RulesetStatus::NotEnforced);
    let missing = [(restrict_calls().is_ok(), LAYERS[0]), (has_landlock, LAYERS[1])];
    missing.into_iter().filter(|(has, _)| !has).map(|(_, name)| name).collect()
}

/// Landlock: of all it knows, whatever this kernel's knows of that, nothing is allowed.
pub fn restrict_files() -> Result<RulesetStatus, RulesetError> {
    let newest = ABI::V10;
    let rules = Ruleset::default()
        .handle_access(AccessFs::from_all(newest))?
        .handle_access(AccessNet::from_all(newest))?
        .scope(Scope::from_all(newest))?;
    Ok(rules.create()?.restrict_self()?.ruleset)
}

/// Whether this kernel has each of [`LAYERS`], found out without being held by them.
pub fn layers() -> Vec<&'static str> {
    // What a thread gives up it takes along when it ends.
    let missing = std::thread::spawn(confine).join().unwrap_or_else(|_| LAYERS.to_vec());
    LAYERS.into_iter().filter(|layer| !missing.contains(layer)).collect()
}

/// Seccomp.
pub fn restrict_calls() -> seccompiler::Result<()> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let breaking_out = BREAKING_OUT.iter().map(|call| (*call, vec![])).collect();
    let refused = SeccompFilter::new(breaking_out, SeccompAction::Allow, SeccompAction::KillProcess, arch)?;
    let missing = SeccompAction::Errno(libc::ENOSYS as u32);
    let allowed = SeccompFilter::new(allowed()?, missing, SeccompAction::Allow, arch)?;
    // Of two filters the sterner answer counts. The second lets no third be installed.
    for filter in [refused, allowed] {
        seccompiler::apply_filter(&BpfProgram::try_from(filter)?)?;
    }
    Ok(())
}

const BREAKING_OUT: &[i64] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_kill,
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_bpf,
    libc::SYS_io_uring_setup,
    libc::SYS_userfaultfd,
];

fn allowed() -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
    const ALWAYS: &[i64] = &[
        // The pipes, and what is said on the way down.
        libc::SYS_read,
        libc::SYS_write,
        // Memory.
        libc::SYS_brk,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_mprotect,
        libc::SYS_madvise,
        // Threads: wasmtime's clock is one.
        libc::SYS_futex,
        libc::SYS_set_robust_list,
        libc::SYS_rseq,
        libc::SYS_gettid,
        libc::SYS_getpid,
        libc::SYS_sched_yield,
        libc::SYS_sched_getaffinity,
        libc::SYS_membarrier,
        libc::SYS_exit,
        libc::SYS_exit_group,
        // Traps of a guest are signals.
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_sigaltstack,
        libc::SYS_restart_syscall,
        // Time, and the seeds of hash maps.
        libc::SYS_clock_gettime,
        libc::SYS_clock_nanosleep,
        libc::SYS_nanosleep,
        libc::SYS_getrandom,
    ];
    let only = |argument, is, value: u64| {
        let condition = SeccompCondition::new(argument, Length::Dword, is, value)?;
        Ok(vec![SeccompRule::new(vec![condition])?])
    };
    let mut calls: BTreeMap<i64, Vec<SeccompRule>> = ALWAYS.iter().map(|call| (*call, vec![])).collect();
    let kind = (libc::MAP_SHARED | libc::MAP_PRIVATE) as u64;
    calls.insert(libc::SYS_mmap, only(3, Is::MaskedEq(kind), libc::MAP_PRIVATE as u64)?);
    // `clone3`, whose flags cannot be looked at, does not exist: C libraries then take this one.
    let thread = libc::CLONE_THREAD as u64;
    calls.insert(libc::SYS_clone, only(0, Is::MaskedEq(thread), thread)?);
    // How a process aborts itself.
    calls.insert(libc::SYS_tgkill, only(0, Is::Eq, std::process::id().into())?);
    Ok(calls)
}

//! Guests that are Wasm components: the engine, its limits, and what a trap is made into.
//!
//! Synchronous throughout: with wasmtime's async calls host functions would run on a small fiber stack. One engine serves
//! the process, one store a guest instance; a store is dropped after its first trap, so the first cause is the only one
//! reported. A native thread advances the epoch, at which a guest's time and the stop flag are looked at.

use std::path::Path;
use std::sync::{OnceLock, mpsc};
use std::time::{Duration, Instant};

use bytes::Bytes;
use host::config::limits::{COMPONENT_STACK, GuestLimits};
use host::error::Location;
use host::worker::StopFlag;
use host::{Error, Result};
use wasmparser::WasmFeatures;
use wasmtime::component::{Component, HasData, HasSelf, Linker, Resource, ResourceTable};
use wasmtime::{
    Cache, CacheConfig, Config, Engine, ResourceLimiter, Store, StoreContextMut, Trap, UpdateDeadline, WasmBacktrace,
    WasmBacktraceDetails,
};
use wasmtime_wasi::cli::{WasiCli, WasiCliCtxView};
use wasmtime_wasi::p2::bindings::cli::{stderr, stdout};
use wasmtime_wasi::p2::{DynOutputStream, OutputStream, Pollable, StreamResult};
use wasmtime_wasi::random::WasiRandom;
use wasmtime_wasi::{I32Exit, WasiCtx};

use super::api::{self, Failure, HostState};
use super::guest::Blame;
use super::isolate;
use super::limits::{PEAKS, Peaks};
use super::log::{SharedLog, clean_line};
use super::training::Training;
use crate::train::Place;

const EPOCH: Duration = Duration::from_millis(10);
/// What a component may be made of, and nothing else of what the engine knows: no threads, garbage collection, exceptions,
/// 64-bit memories, stack switching, nor async, which advisories were about and no guest needs.
const FEATURES: WasmFeatures = WasmFeatures::WASM2
    .union(WasmFeatures::EXTENDED_CONST)
    .union(WasmFeatures::MULTI_MEMORY)
    .union(WasmFeatures::COMPONENT_MODEL);
/// `HashMap`'s seed in a guest: the same in every run and on every rank.
const INSECURE_SEED: u128 = 0x686f_7374;

/// What a store holds.
pub struct GuestData {
    pub host: HostState,
    wasi: WasiCtx,
    table: ResourceTable,
    space: Space,
}

/// The process's engine; the first call starts the thread that advances its epoch.
pub fn engine() -> Result<&'static Engine> {
    static ENGINE: OnceLock<std::result::Result<Engine, String>> = OnceLock::new();
    ENGINE
        .get_or_init(|| {
            let engine = Engine::new(&config()).map_err(|error| format!("{error:#}"))?;
            let ticking = engine.weak();
            std::thread::Builder::new()
                .name("epoch".into())
                .spawn(move || {
                    while let Some(engine) = ticking.upgrade() {
                        engine.increment_epoch();
                        drop(engine);
                        std::thread::sleep(EPOCH);
                    }
                })
                .map_err(|error| error.to_string())?;
            Ok(engine)
        })
        .as_ref()
        .map_err(|cause| Error::bug("cannot set up the Wasm engine").cause(cause))
}

fn config() -> Config {
    let mut config = Config::new();
    config
        .wasm_component_model(true)
        .epoch_interruption(true)
        .max_wasm_stack(COMPONENT_STACK)
        .wasm_backtrace_details(WasmBacktraceDetails::Enable)
        .cranelift_nan_canonicalization(true)
        .concurrency_support(false)
        .shared_memory(false)
        .wasm_features(!FEATURES, false)
        .cache(if isolate::is_confined() { None } else { cache() });
    if isolate::is_confined() {
        // Every data worker has such a process: one core is its share. And it cannot make files of memory.
        config.parallel_compilation(false).memory_init_cow(false);
    }
    config
}

/// The cache of compiled guests. It holds native code, so only the user may be able to write it.
fn cache() -> Option<Cache> {
    use std::os::unix::fs::{DirBuilderExt, MetadataExt};
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(std::path::PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| std::env::home_dir().map(|home| home.join(".cache")))?;
    let dir = base.join("host").join("wasm");
    let opened = std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&dir)
        .and_then(|()| std::fs::metadata(&dir))
        .map_err(|error| error.to_string())
        .and_then(|metadata| {
            let private = metadata.mode() & 0o022 == 0 && metadata.uid() == rustix::process::geteuid().as_raw();
            private.then_some(()).ok_or_else(|| "others may write it".to_string())
        })
        .and_then(|()| {
            let mut config = CacheConfig::new();
            config.with_directory(&dir);
            Cache::new(config).map_err(|error| format!("{error:#}"))
        });
    match opened {
        Ok(cache) => Some(cache),
        Err(error) => {
            tracing::warn!("compiled guests are not cached in `{}`: {error}", dir.display());
            None
        }
    }
}

/// Sums over a guest's memories, where wasmtime's own limit is per memory; and counts what else it is made of.
struct Space {
    limits: GuestLimits,
    used: usize,
    /// The first growth that was refused, in bytes; the guest's end is then most likely about it.
    refused: Option<usize>,
}

impl Space {
    fn memory(&self) -> usize {
        self.limits.memory_mb << 20
    }
}

impl ResourceLimiter for Space {
    fn memory_growing(&mut self, current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        let wanted = self.used.saturating_add(desired.saturating_sub(current));
        let fits = wanted <= self.memory();
        if fits {
            self.used = wanted;
            Peaks::raise(&PEAKS.memory, wanted as u64);
        } else {
            self.refused.get_or_insert(wanted);
        }
        Ok(fits)
    }

    fn table_growing(&mut self, _current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        Ok(desired <= self.limits.table_elements)
    }

    fn instances(&self) -> usize {
        self.limits.instances
    }

    fn tables(&self) -> usize {
        self.limits.tables
    }

    fn memories(&self) -> usize {
        self.limits.memories
    }
}

/// A store for one instance of a guest.
pub fn new_store(host: HostState, limits: &GuestLimits) -> Result<Store<GuestData>> {
    let wasi = WasiCtx::builder().insecure_random_seed(INSECURE_SEED).build();
    let space = Space { limits: limits.clone(), used: 0, refused: None };
    let mut table = ResourceTable::new();
    table.set_max_capacity(limits.handles);
    let mut store = Store::new(engine()?, GuestData { host, wasi, table, space });
    store.limiter(|guest| &mut guest.space);
    store.set_hostcall_fuel(limits.hostcall_mb << 20);
    // Above our own limit, which answers with an error a guest can read; this one traps.
    store.set_max_component_handles(limits.handles + 1000);
    store.set_epoch_deadline(1);
    store.epoch_deadline_callback(on_epoch);
    Ok(store)
}

fn on_epoch(mut store: StoreContextMut<'_, GuestData>) -> wasmtime::Result<UpdateDeadline> {
    let host = &mut store.data_mut().host;
    match host.clock.check() {
        Ok(()) => Ok(UpdateDeadline::Continue(1)),
        Err(failure) => {
            host.fail(failure);
            Err(wasmtime::Error::msg("the host ended the guest"))
        }
    }
}

/// Compiles a component that [`super::guest::read`] let through.
///
/// Cranelift has no limit of its own, and what it takes may be the square of what it is given. It is watched from here; once
/// it has taken too much there is nothing to be done but to end the process, which the error does: its threads go on until
/// then.
pub fn compile(path: &Path, bytes: &[u8], limits: &GuestLimits) -> Result<Component> {
    let (engine, owned) = (engine()?, bytes.to_vec());
    let (sender, receiver) = mpsc::channel();
    let (begun, held) = (Instant::now(), resident_bytes());
    std::thread::Builder::new()
        .name("compile".into())
        .spawn(move || sender.send(Component::new(engine, owned)))
        .map_err(|error| Error::run("cannot start a thread to compile a component").cause(error))?;
    let failed = || Error::config(format!("cannot compile `{}`", path.display()));
    loop {
        match receiver.recv_timeout(EPOCH) {
            Ok(compiled) => return compiled.map_err(|error| failed().cause(format!("{error:#}"))),
            Err(mpsc::RecvTimeoutError::Disconnected) => return Err(Error::bug("compiling a component panicked")),
            Err(mpsc::RecvTimeoutError::Timeout) => {}
        }
        if begun.elapsed().as_secs_f64() > limits.compile_seconds {
            return Err(failed().cause(format!("it takes more than {} s", limits.compile_seconds)).hint(
                "`limits.compile_seconds` raises the limit; a component of someone else's may do this on purpose",
            ));
        }
        if resident_bytes().saturating_sub(held) > limits.compile_mb << 20 {
            return Err(failed()
                .cause(format!("it takes more than {} MiB", limits.compile_mb))
                .hint("`limits.compile_mb` raises the limit; a component of someone else's may do this on purpose"));
        }
    }
}

/// What the process takes of the machine's memory.
fn resident_bytes() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    match text.split_whitespace().nth(1).and_then(|pages| pages.parse::<usize>().ok()) {
        Some(pages) => pages * rustix::param::page_size(),
        // A confined process sees no file; its memory is limited as a whole.
        None => 0,
    }
}

/// What an import list that passed cannot tell: whether the types agree.
pub fn link_error(path: &Path, error: wasmtime::Error) -> Error {
    Error::config(format!("`{}` does not fit this host's host:sdk {}", path.display(), super::guest::SDK_VERSION))
        .cause(format!("{error:#}"))
        .hint("build it again with the `host-sdk` of this host, or take a later host")
}

struct HasTable;

impl HasData for HasTable {
    type Data<'a> = &'a mut ResourceTable;
}

/// Links what [`super::guest`] lets a guest import of WASI, and nothing else.
pub fn link_inert_wasi(linker: &mut Linker<GuestData>) -> wasmtime::Result<()> {
    use wasmtime_wasi::p2::bindings::{cli, random, sync};
    let l = linker;
    fn view(guest: &mut GuestData) -> WasiCliCtxView<'_> {
        WasiCliCtxView { ctx: guest.wasi.cli(), table: &mut guest.table }
    }
    cli::environment::add_to_linker::<_, WasiCli>(l, view)?;
    cli::exit::add_to_linker::<_, WasiCli>(l, view)?;
    cli::stdin::add_to_linker::<_, WasiCli>(l, view)?;
    cli::stdout::add_to_linker::<_, HasSelf<GuestData>>(l, |guest| guest)?;
    cli::stderr::add_to_linker::<_, HasSelf<GuestData>>(l, |guest| guest)?;
    cli::terminal_input::add_to_linker::<_, WasiCli>(l, view)?;
    cli::terminal_output::add_to_linker::<_, WasiCli>(l, view)?;
    cli::terminal_stdin::add_to_linker::<_, WasiCli>(l, view)?;
    cli::terminal_stdout::add_to_linker::<_, WasiCli>(l, view)?;
    cli::terminal_stderr::add_to_linker::<_, WasiCli>(l, view)?;
    random::insecure_seed::add_to_linker::<_, WasiRandom>(l, |guest| guest.wasi.random())?;
    wasmtime_wasi_io::bindings::wasi::io::error::add_to_linker::<_, HasTable>(l, |guest| &mut guest.table)?;
    sync::io::poll::add_to_linker::<_, HasTable>(l, |guest| &mut guest.table)?;
    sync::io::streams::add_to_linker::<_, HasTable>(l, |guest| &mut guest.table)?;
    Ok(())
}

/// The guest's standard output and error, which go to the log.
struct Output(SharedLog);

#[wasmtime_wasi::async_trait]
impl Pollable for Output {
    async fn ready(&mut self) {}
}

impl OutputStream for Output {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.0.write(&bytes);
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(64 << 10)
    }
}

impl GuestData {
    fn output(&mut self) -> wasmtime::Result<Resource<DynOutputStream>> {
        let stream: DynOutputStream = Box::new(Output(self.host.log.clone()));
        Ok(self.table.push(stream)?)
    }
}

impl stdout::Host for GuestData {
    fn get_stdout(&mut self) -> wasmtime::Result<Resource<DynOutputStream>> {
        self.output()
    }
}

impl stderr::Host for GuestData {
    fn get_stderr(&mut self) -> wasmtime::Result<Resource<DynOutputStream>> {
        self.output()
    }
}

/// A compiled recipe.
pub struct Recipe {
    pre: api::wit::RecipePre<GuestData>,
}

impl Recipe {
    pub fn load(path: &Path, bytes: &[u8], limits: &GuestLimits) -> Result<Self> {
        let component = compile(path, bytes, limits)?;
        let mut linker = Linker::new(engine()?);
        link_inert_wasi(&mut linker)
            .and_then(|()| {
                api::wit::Recipe::add_to_linker::<_, HasSelf<HostState>>(&mut linker, |guest| &mut guest.host)
            })
            .map_err(|error| Error::bug("cannot link the SDK").cause(format!("{error:#}")))?;
        let pre = linker.instantiate_pre(&component).map_err(|error| link_error(path, error))?;
        Ok(Self { pre: api::wit::RecipePre::new(pre).map_err(|error| link_error(path, error))? })
    }

    pub fn run(
        self,
        mut blame: Blame,
        limits: &GuestLimits,
        training: Box<dyn Training>,
        stop: StopFlag,
    ) -> Result<()> {
        let name = blame.path.display().to_string();
        let mut store = new_store(HostState::new(&name, limits, stop, Some(training)), limits)?;
        let outcome = self.pre.instantiate(&mut store).and_then(|recipe| recipe.call_main(&mut store));
        blame.place = store.data().host.place();
        match outcome {
            Ok(Ok(())) => store.data_mut().host.check_end(&blame),
            Ok(Err(failure)) => Err(blame.given_up(failure)),
            Err(error) => Err(explain(&blame, store.data_mut(), &error)),
        }
    }
}

/// What came of a call: its value, what the guest gave up with, or a trap.
pub fn ended<T>(
    blame: &Blame,
    store: &mut Store<GuestData>,
    outcome: wasmtime::Result<std::result::Result<T, api::types::Failure>>,
) -> Result<T> {
    match outcome {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(failure)) => Err(blame.given_up(failure)),
        Err(error) => Err(explain(blame, store.data_mut(), &error)),
    }
}

/// A trap as an error: the first cause, then where it was.
pub fn explain(blame: &Blame, guest: &mut GuestData, trap: &wasmtime::Error) -> Error {
    let mut error = match guest.host.take_failure() {
        Some(Failure::Run(error)) => {
            let frame = frames(trap).into_iter().next();
            let location = frame.as_ref().and_then(|(_, place)| place.clone());
            let location = location.map(|(file, line)| Location { file: file.into(), line, column: None });
            return guest.host.run_failure(error, Place { location, function: frame.map(|(name, _)| name) });
        }
        Some(Failure::Guest(mistake)) => blame.mistake(mistake),
        None => blame.error(),
    };
    let ended_by_host = !error.causes.is_empty();
    if let Some(wanted) = guest.space.refused {
        let (wanted, limit) = (wanted.div_ceil(1 << 20), guest.space.limits.memory_mb);
        error = error
            .cause(format!("the guest asked for {wanted} MiB of memory, and its limit is {limit} MiB"))
            .hint("`limits.memory_mb` raises the limit");
    }
    if !ended_by_host {
        let said = guest.host.log.tail();
        let silent = said.is_empty();
        error.causes.extend(said.into_iter().filter(|line| !line.starts_with("note: run with `RUST_BACKTRACE")));
        let stopped_itself = matches!(trap.downcast_ref(), Some(Trap::UnreachableCodeReached));
        if stopped_itself && silent && guest.space.refused.is_none() {
            error = error.hint(
                "an exception that a JavaScript or Python guest does not catch ends so: catch it, and give back a \
                 failure",
            );
        }
        let engines = trap.root_cause().to_string();
        if is_misshapen(&engines) {
            error = error
                .cause("what it hands over does not read as the SDK's types")
                .hint("make it with the SDK, or with tools that read `sdk/wit`");
        }
        error.causes.extend(match (trap.downcast_ref::<I32Exit>(), trap.downcast_ref::<Trap>()) {
            (Some(I32Exit(code)), _) => Some(format!("the guest called `exit({code})`")),
            // How a panic ends; its text says more.
            (_, Some(Trap::UnreachableCodeReached)) => {
                silent.then(|| "the guest stopped itself (`unreachable`)".into())
            }
            (_, Some(Trap::MemoryOutOfBounds)) => {
                Some("it touched memory that it does not have; a recursion without end comes to this".into())
            }
            (_, Some(Trap::StackOverflow)) => Some("its calls went too deep for the stack".into()),
            (_, Some(trap)) => Some(trap.to_string()),
            _ => Some(engines.clone()),
        });
        error.hints.extend(raised_by(&engines));
    }
    add_frames(error, trap)
}

/// The key of the config that a refusal of the engine's is about, by its words.
fn raised_by(cause: &str) -> Option<String> {
    const WORDS: [(&str, &str); 5] = [
        ("fuel allocated for hostcalls", "hostcall_mb"),
        ("memory count too high", "memories"),
        ("table count too high", "tables"),
        ("instance count too high", "instances"),
        ("exceeds table limits", "table_elements"),
    ];
    let (_, key) = WORDS.iter().find(|(words, _)| cause.contains(words))?;
    Some(format!("`limits.{key}` raises the limit"))
}

/// Whether bytes of the guest could not be read as a value, by the engine's words.
fn is_misshapen(cause: &str) -> bool {
    ["discriminant", "out of bounds of memory", "not aligned", "utf-8"].iter().any(|words| cause.contains(words))
}

/// A function of the guest, and where its source says it is: file and line.
type Frame = (String, Option<(String, Option<usize>)>);

/// The guest's own frames, the innermost first.
fn frames(trap: &wasmtime::Error) -> Vec<Frame> {
    let Some(backtrace) = trap.downcast_ref::<WasmBacktrace>() else { return vec![] };
    let mut frames: Vec<Frame> = vec![];
    for frame in backtrace.frames() {
        if frame.symbols().is_empty() {
            frames.extend(frame.func_name().map(|name| (plain_symbol(name), None)));
        }
        for symbol in frame.symbols() {
            let name = symbol.name().or(frame.func_name()).unwrap_or("?");
            let line = symbol.line().map(|line| line as usize);
            frames.push((plain_symbol(name), symbol.file().map(|file| (clean_line(file), line))));
        }
    }
    frames.retain(|(name, place)| !is_runtime_frame(name, place.as_ref().map(|(file, _)| file.as_str())));
    frames.dedup();
    frames
}

/// Adds where in the guest it was: the innermost of its own frames as the location, its callers as causes.
fn add_frames(mut error: Error, trap: &wasmtime::Error) -> Error {
    const MAX_FRAMES: usize = 8;
    let frames = frames(trap);
    if let Some((file, line)) = frames.iter().find_map(|(_, place)| place.clone()) {
        error = error.at(file, line, None);
    }
    if frames.len() == 1 && !error.locations.is_empty() {
        return error;
    }
    for (name, place) in frames.into_iter().take(MAX_FRAMES) {
        error = error.cause(match place {
            Some((file, Some(line))) => format!("in `{name}` ({file}:{line})"),
            Some((file, None)) => format!("in `{name}` ({file})"),
            None => format!("in `{name}`"),
        });
    }
    error
}

/// Frames of the language's runtime, the SDK and generated code say nothing to a guest's author.
fn is_runtime_frame(name: &str, file: Option<&str>) -> bool {
    const FILES: &[&str] = &["/rustc/", "/library/", "sdk/rust/src/", "registry/"];
    const NAMES: &[&str] = &[
        "std::",
        "core::",
        "alloc::",
        "<alloc::",
        "<core::",
        "<std::",
        "host_sdk::",
        "<host_sdk::",
        "__",
        "_export_",
        "export_",
        "rust_",
        "abort",
        "exit",
        "_start",
        "cabi_",
        "wasi:",
        "wit-component:",
        "wit_bindgen",
        "dlmalloc",
        "<dlmalloc",
    ];
    file.is_some_and(|file| FILES.iter().any(|part| file.contains(part)))
        || NAMES.iter().any(|prefix| name.starts_with(prefix))
}

/// A symbol as it may be shown, without the hash that Rust's older mangling ends it with.
fn plain_symbol(name: &str) -> String {
    let name = &clean_line(name);
    match name.rsplit_once("::h") {
        Some((path, hash)) if hash.len() == 16 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()) => path.to_string(),
        _ => name.to_string(),
    }
}

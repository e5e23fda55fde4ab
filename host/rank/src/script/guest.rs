//! Guest files: read, told apart by content, and turned away with a reason when they cannot be what the config needs.
//!
//! Everything a component wants of its host stands in its import list, which is read before a byte of it is compiled.
//! An interface that is not on the list below does not exist for guests.

use std::path::{Path, PathBuf};

use super::api::types;
use super::log::clean_line;
use host::config::limits::{COMPONENT_DEPTH, GuestLimits, SCRIPT_BYTES};
use host::error::quoted;
use host::{Error, Result};
use wasmparser::{ComponentTypeRef, Encoding, Parser, Payload};

/// The SDK this host offers.
pub const SDK_VERSION: &str = "0.1.0";

/// What a Rust guest's standard library imports without being asked. All of it is linked to nothing: no arguments, an
/// empty environment, a closed input, outputs that end in the log, a fixed seed.
const INERT_WASI: &[&str] = &[
    "wasi:cli/environment",
    "wasi:cli/exit",
    "wasi:cli/stdin",
    "wasi:cli/stdout",
    "wasi:cli/stderr",
    "wasi:cli/terminal-input",
    "wasi:cli/terminal-output",
    "wasi:cli/terminal-stdin",
    "wasi:cli/terminal-stdout",
    "wasi:cli/terminal-stderr",
    "wasi:io/error",
    "wasi:io/poll",
    "wasi:io/streams",
    "wasi:random/insecure-seed",
];

/// What a component of each world exports.
const WORLDS: [(World, &str); 3] =
    [(World::Recipe, "main"), (World::Template, "host:sdk/rows"), (World::Loss, "host:sdk/scoring")];

/// What a guest is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum World {
    Recipe,
    Template,
    Loss,
}

impl World {
    pub fn noun(self) -> &'static str {
        match self {
            Self::Recipe => "recipe",
            Self::Template => "template",
            Self::Loss => "loss",
        }
    }
}

/// The world that a component is of, by what it exports; none where it is of none, or no component.
pub fn world_of(bytes: &[u8]) -> Option<World> {
    let surface = surface(bytes).ok()?;
    let exports = |needed: &str| surface.exports.iter().any(|name| split_version(name).0 == needed);
    WORLDS.iter().find(|(_, needed)| exports(needed)).map(|(world, _)| *world)
}

/// What a component asks of its host.
pub fn imports_of(bytes: &[u8]) -> Vec<String> {
    surface(bytes).map(|surface| surface.imports).unwrap_or_default()
}

/// A guest's content.
pub enum Guest {
    Component(Vec<u8>),
    Script(String),
}

/// Reads a guest file and says what it is, by content.
pub fn read(path: &Path, world: World, limits: &GuestLimits) -> Result<Guest> {
    of_bytes(path, bytes_of(path, world.noun(), limits)?, world)
}

/// The bytes of a file that may be a guest.
pub fn bytes_of(path: &Path, noun: &str, limits: &GuestLimits) -> Result<Vec<u8>> {
    let cannot = |cause: String| Error::config(format!("cannot read the {noun} `{}`", path.display())).cause(cause);
    let metadata = std::fs::metadata(path).map_err(|error| {
        let hint = match error.kind() {
            std::io::ErrorKind::NotFound => {
                Some("`host ls` lists the recipes; `cargo xtask build` builds the shipped ones")
            }
            _ => None,
        };
        hint.into_iter().fold(cannot(error.to_string()), |error, hint| error.hint(hint))
    })?;
    if !metadata.is_file() {
        return Err(cannot("it is not a file".into()));
    }
    let most = (limits.guest_mb as u64) << 20;
    if metadata.len() > most {
        let needed = metadata.len().div_ceil(1 << 20);
        return Err(too_large(path, noun, metadata.len(), most).hint(format!(
            "`limits.guest_mb={needed}` in the config lets it in, `--guest-mb {needed}` at `host check`"
        )));
    }
    std::fs::read(path).map_err(|error| cannot(error.to_string()))
}

fn too_large(path: &Path, noun: &str, bytes: u64, limit: u64) -> Error {
    Error::config(format!("cannot read the {noun} `{}`", path.display()))
        .cause(format!("it has {bytes} bytes, and a guest may have {limit}"))
}

/// What a guest file's bytes are, and that they may be used.
pub fn of_bytes(path: &Path, bytes: Vec<u8>, world: World) -> Result<Guest> {
    let noun = world.noun();
    if bytes.starts_with(b"\0asm") {
        check_component(path, &bytes, world)?;
        return Ok(Guest::Component(bytes));
    }
    if bytes.is_empty() {
        return Err(Error::config(format!("the {noun} `{}` is empty", path.display())));
    }
    let named_wasm = path.extension().is_some_and(|extension| extension == "wasm");
    match String::from_utf8(bytes) {
        Ok(text) if !named_wasm && !text.contains('\0') => {
            if text.len() > SCRIPT_BYTES {
                return Err(too_large(path, noun, text.len() as u64, SCRIPT_BYTES as u64));
            }
            Ok(Guest::Script(text))
        }
        Ok(text) if named_wasm => {
            let start: String = text.chars().take(24).collect();
            Err(Error::config(format!("the {noun} `{}` is a text file, not a Wasm component", path.display()))
                .cause(format!("it starts with `{}`", super::log::clean_line(start.lines().next().unwrap_or_default())))
                .hint("a Rhai script's name ends in `.rhai`"))
        }
        _ => {
            Err(Error::config(format!("the {noun} `{}` is neither a Wasm component nor a Rhai script", path.display()))
                .hint("name a file that `host ls` lists, or build one with `cargo build --target wasm32-wasip2`"))
        }
    }
}

/// The names a component imports and exports, as they may be shown.
#[derive(Default)]
struct Surface {
    imports: Vec<String>,
    exports: Vec<String>,
    /// How many components and modules are in each other.
    depth: usize,
}

fn surface(bytes: &[u8]) -> std::result::Result<Surface, wasmparser::BinaryReaderError> {
    let mut surface = Surface::default();
    let mut depth = 0_usize;
    for payload in Parser::new(0).parse_all(bytes) {
        match payload? {
            Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => {
                depth += 1;
                surface.depth = surface.depth.max(depth);
            }
            Payload::End(_) => depth = depth.saturating_sub(1),
            Payload::ComponentImportSection(section) if depth == 0 => {
                for import in section {
                    let import = import?;
                    // A type that the world uses stands there by its bare name; it asks for nothing.
                    if !matches!(import.ty, ComponentTypeRef::Type(_)) {
                        surface.imports.push(clean_line(import.name.name));
                    }
                }
            }
            Payload::ComponentExportSection(section) if depth == 0 => {
                for export in section {
                    surface.exports.push(clean_line(export?.name.name));
                }
            }
            _ => {}
        }
    }
    Ok(surface)
}

/// Turns away what is no component, asks for another SDK or for more than guests get, or is of another world.
fn check_component(path: &Path, bytes: &[u8], world: World) -> Result<()> {
    let (noun, shown) = (world.noun(), path.display());
    if Parser::is_core_wasm(bytes) {
        return Err(Error::config(format!("the {noun} `{shown}` is a core Wasm module, not a component"))
            .hint("build it with `cargo build --target wasm32-wasip2`"));
    }
    let broken = |cause: String| Error::config(format!("the {noun} `{shown}` is not a Wasm component")).cause(cause);
    match Parser::new(0).parse_all(bytes).next() {
        Some(Ok(Payload::Version { encoding: Encoding::Component, .. })) => {}
        Some(Err(error)) => return Err(broken(error.to_string())),
        _ => return Err(broken("it does not start with a component's header".into())),
    }
    let surface = surface(bytes).map_err(|error| broken(format!("it is cut short or damaged: {error}")))?;
    if surface.depth > COMPONENT_DEPTH {
        let depth = surface.depth;
        return Err(Error::config(format!("the {noun} `{shown}` is too deep to be compiled"))
            .cause(format!("{depth} components are in each other, and {COMPONENT_DEPTH} may be")));
    }
    check_versions(path, &surface, world)?;
    check_world(path, &surface, world)?;
    check_imports(path, &surface, world)
}

fn split_version(name: &str) -> (&str, Option<&str>) {
    match name.split_once('@') {
        Some((name, version)) => (name, Some(version)),
        None => (name, None),
    }
}

/// Versions that differ in their last number only: a later one has more functions, and all of the earlier ones as they were. A
/// guest that uses one of those is told when it is linked.
fn is_offered(version: &str) -> bool {
    fn minor(version: &str) -> Option<&str> {
        version.rsplit_once('.').map(|(minor, _)| minor)
    }
    minor(version) == minor(SDK_VERSION)
}

fn check_versions(path: &Path, surface: &Surface, world: World) -> Result<()> {
    for name in surface.imports.iter().chain(&surface.exports) {
        let (interface, version) = split_version(name);
        if !interface.starts_with("host:sdk/") || version.is_some_and(is_offered) {
            continue;
        }
        let wanted = version.unwrap_or("without a version");
        let noun = world.noun();
        return Err(Error::config(format!("{noun} wants host:sdk {wanted}, this host offers {SDK_VERSION}"))
            .at_file(path)
            .hint(format!("build the {noun} with the `host-sdk` of this host, or take the host it was built for")));
    }
    Ok(())
}

fn check_world(path: &Path, surface: &Surface, world: World) -> Result<()> {
    let exports = |needed: &str| surface.exports.iter().any(|name| split_version(name).0 == needed);
    let needed = WORLDS.iter().find(|(of, _)| *of == world).map_or("main", |(_, needed)| needed);
    if exports(needed) {
        return Ok(());
    }
    let noun = world.noun();
    let other = WORLDS.iter().find(|(_, needed)| exports(needed));
    Err(match other {
        Some((other, _)) => Error::config(format!("`{}` is a {}, not a {noun}", path.display(), other.noun())),
        None => {
            let exports = match surface.exports.as_slice() {
                [] => "it exports nothing".to_string(),
                exports => format!("it exports {}", quoted(exports)),
            };
            Error::config(format!("the component `{}` is not a {noun} of host:sdk", path.display()))
                .cause(format!("{exports}, not `{needed}`"))
        }
    }
    .hint(format!("a {noun} in Rust ends with `host_sdk::{noun}!(…)`")))
}

/// The interfaces of the SDK that a guest of a world may use.
pub fn granted(world: World) -> &'static [&'static str] {
    match world {
        World::Recipe => &["host:sdk/types", "host:sdk/tensors", "host:sdk/training"],
        World::Template => &["host:sdk/types"],
        World::Loss => &["host:sdk/types", "host:sdk/tensors"],
    }
}

fn check_imports(path: &Path, surface: &Surface, world: World) -> Result<()> {
    let sdk = granted(world);
    let mut denied: Vec<&str> = surface
        .imports
        .iter()
        .map(|name| split_version(name).0)
        .filter(|name| !sdk.contains(name) && !INERT_WASI.contains(name))
        .collect();
    // Opening a file brings clocks along: name first what the author most likely meant.
    const TELLING: &[&str] = &["wasi:filesystem", "wasi:sockets", "wasi:http", "wasi:random"];
    denied.sort_by_key(|name| TELLING.iter().position(|package| name.starts_with(package)).unwrap_or(TELLING.len()));
    let Some(first) = denied.first() else { return Ok(()) };
    let (noun, shown) = (world.noun(), path.display());
    let error = Error::config(format!("the {noun} `{shown}` wants `{first}`, which guests do not get"));
    let error = match denied.len() {
        1 => error,
        _ => error.cause(format!("it imports {}", quoted(&denied))),
    };
    Err(error.hint(match first.split('/').next().unwrap_or_default() {
        "wasi:filesystem" => {
            "a guest has no files: remove what uses `std::fs`; data comes as rows, settings from the config"
        }
        "wasi:clocks" => "a guest has no clock: remove what uses `std::time`; the host measures and logs time",
        "wasi:random" => "a guest has no random numbers, so that a run can be repeated",
        "wasi:sockets" | "wasi:http" => "a guest has no network",
        _ => "a guest may import `host:sdk` only",
    }))
}

/// Who is to be named when a guest fails.
#[derive(Clone)]
pub struct Blame {
    pub world: World,
    pub path: PathBuf,
    /// Where in the work it was: `at step 3`, `on rows 0 to 255`.
    pub place: Option<String>,
}

impl Blame {
    /// The headline of a guest's failure; a place in the guest follows.
    pub fn error(&self) -> Error {
        let place = self.place.as_ref().map(|place| format!(" {place}")).unwrap_or_default();
        Error::run(format!("{} `{}` failed{place}", self.world.noun(), self.path.display()))
    }

    /// The guest handed back an error.
    pub fn given_up(&self, failure: types::Failure) -> Error {
        let mut error = self.mistake(failure.error);
        if let Some((file, line)) = failure.at.as_deref().and_then(|at| at.rsplit_once(':')) {
            error = error.at(file, line.parse().ok(), None);
        }
        error
    }

    pub fn mistake(&self, mistake: types::Error) -> Error {
        let mut error = self.error().cause(super::log::clean_line(&mistake.message));
        error.hints.extend(mistake.hint.as_deref().map(super::log::clean_line));
        error
    }
}

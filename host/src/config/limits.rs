//! What a guest may use: every limit there is, those of the config's section `limits` and those that others rest on.
//!
//! Nothing of an engine's own defaults is relied upon: what is not here is switched off. A script's limits multiply to
//! `memory_mb` (tests/scripting/memory.rs): half of it may be held, and one operation makes at most as much again, because
//! strings are short and arrays and maps small.

use serde::{Deserialize, Serialize};

/// The section `limits`; the same policy for Wasm and Rhai. [`super::registry::keys::LIMITS`] says what each is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuestLimits {
    pub memory_mb: usize,
    pub tensors_mb: usize,
    pub handles: usize,
    pub hostcall_mb: usize,
    pub guest_mb: usize,
    pub compile_mb: usize,
    pub compile_seconds: f64,
    pub log_lines: usize,
    pub memories: usize,
    pub instances: usize,
    pub tables: usize,
    pub table_elements: usize,
    pub operations: u64,
    pub seconds: f64,
    /// Templates run in processes of their own; the config says so beside its `limits`.
    pub isolate: bool,
}

impl Default for GuestLimits {
    fn default() -> Self {
        Self {
            memory_mb: 256,
            tensors_mb: 32 << 10,
            handles: 20_000,
            hostcall_mb: 32,
            guest_mb: 10,
            compile_mb: 2048,
            compile_seconds: 60.0,
            log_lines: 10_000,
            memories: 4,
            instances: 64,
            tables: 32,
            table_elements: 100_000,
            operations: 10_000_000_000,
            seconds: 30.0,
            isolate: false,
        }
    }
}

impl GuestLimits {
    /// Bytes that a script may hold before its next operation.
    pub fn script_bytes(&self) -> usize {
        (self.memory_mb << 20) / 2
    }

    /// Bytes of a script's string, or of all strings of an array or a map. Splitting one takes 70 times as much.
    pub fn script_string(&self) -> usize {
        (self.memory_mb << 20) / 256
    }
}

/// A component's own stack, for all its calls.
pub const COMPONENT_STACK: usize = 512 << 10;
/// Components in each other.
pub const COMPONENT_DEPTH: usize = 32;
/// Bytes of a line of the log.
pub const LOG_LINE: usize = 1 << 10;
/// A script's text, in bytes.
pub const SCRIPT_BYTES: usize = 1 << 20;
/// A script's function calls on top of each other.
pub const SCRIPT_CALLS: usize = 32;
/// How deep a script's expression may be outside and inside a function.
pub const SCRIPT_EXPRESSION: [usize; 2] = [64, 32];
/// Variables of a script that are alive at once.
pub const SCRIPT_VARIABLES: usize = 256;
/// Functions of a script.
pub const SCRIPT_FUNCTIONS: usize = 256;
/// Elements of a script's array, those of arrays in it included.
pub const SCRIPT_ARRAY: usize = 65_536;
/// Entries of a script's map, those of maps in it included.
pub const SCRIPT_MAP: usize = 4_096;
/// The stack of a thread that scripts run on; address space, until it is used. Comparing values that are nested as deep as
/// arrays and maps have room takes 2 KiB a level.
pub const SCRIPT_STACK: usize = 256 << 20;

/// The limits as `host doctor` tells them: name and value of the keys, then of the rest those of components and of scripts.
pub fn told() -> (Vec<(&'static str, &'static str)>, [String; 2]) {
    let keys = super::registry::keys::LIMITS.iter().filter_map(|key| Some((key.name, key.default?))).collect();
    let [outside, inside] = SCRIPT_EXPRESSION;
    let (stack, text) = (COMPONENT_STACK >> 10, SCRIPT_BYTES >> 10);
    let component =
        format!("components: {stack} KiB of stack, {COMPONENT_DEPTH} in each other, log lines of {LOG_LINE} bytes");
    let script = format!(
        "scripts: {text} KiB long, strings of memory_mb / 256, arrays of {SCRIPT_ARRAY}, maps of {SCRIPT_MAP}, {SCRIPT_CALLS} \
         calls and {outside} expressions deep ({inside} in functions), {SCRIPT_VARIABLES} variables, {SCRIPT_FUNCTIONS} functions"
    );
    (keys, [component, script])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_those_of_the_keys() {
        let mut defaults = serde_json::to_value(GuestLimits::default()).unwrap();
        defaults.as_object_mut().unwrap().remove("isolate");
        let keys: Vec<(String, f64)> =
            told().0.into_iter().map(|(name, value)| (name.to_owned(), value.parse().unwrap())).collect();
        assert_eq!(keys.len(), defaults.as_object().unwrap().len());
        for (name, value) in keys {
            assert_eq!(defaults[&name].as_f64(), Some(value), "limits.{name}");
        }
    }
}

//! Components that no compiler makes, written by hand, and what is said of them.

use host::worker::StopFlag;
use host_rank::script::SDK_VERSION;
use insta::assert_snapshot;
use serde_json::json;

use crate::support::{Linear, run_with, tight};

/// The types that a failure is made of, as an import of `host:sdk/types` has them.
pub const FAILURE: &str = r#"
            (type $c (enum "invalid" "shape" "missing" "denied" "limit" "data" "collective" "unsupported" "internal"))
            (export "code" (type $code (eq $c)))
            (type $e (record (field "code" $code) (field "message" string) (field "hint" (option string))))
            (export "error" (type $error (eq $e)))
            (type $f (record (field "error" $error) (field "at" (option string))))
            (export "failure" (type $failure (eq $f)))"#;

/// What a recipe imports and exports, around the core module `$m`.
fn recipe(module: &str) -> String {
    component(
        &format!("(core module $m (memory (export \"memory\") 1) {module})"),
        "(core instance $i (instantiate $m (with \"host\" (instance (export \"log\" (func $log))))))",
    )
}

fn component(modules: &str, instances: &str) -> String {
    let imports = r#"
        (import "host:sdk/types@VERSION" (instance $types
            FAILURE
            (export "log" (func (param "message" string)))))
        (alias export $types "failure" (type $failure))
        (core module $libc (memory (export "memory") 1 1000))
        (core instance $libc (instantiate $libc))
        (core func $log (canon lower (func $types "log") (memory $libc "memory")))"#;
    let main = r#"
        (func (export "main") (result (result (error $failure)))
            (canon lift (core func $i "main") (memory $i "memory")))"#;
    format!(
        "(component {} {modules} {instances} {main})",
        imports.replace("VERSION", SDK_VERSION).replace("FAILURE", FAILURE)
    )
}

/// One that returns at once, with `fields` besides.
fn idle(fields: &str) -> String {
    recipe(&format!("{fields} {IDLE}"))
}

const IDLE: &str = r#"(func (export "main") (result i32) (i32.const 0))"#;

/// What is said of a component, from reading it to the end of its run.
fn report(text: &str) -> String {
    let bytes = wat::parse_str(text).unwrap_or_else(|error| panic!("{error}"));
    of_bytes(&bytes)
}

fn of_bytes(bytes: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r.wasm");
    std::fs::write(&path, bytes).unwrap();
    let outcome = run_with(path.to_str().unwrap(), &tight(), Linear::new(json!({})), StopFlag::default());
    let error = outcome.err().map_or("no error".to_owned(), |error| error.to_string());
    error.replace(dir.path().to_str().unwrap(), "[DIR]")
}

#[test]
fn the_harmless_one_only_returns_early() {
    assert_snapshot!(report(&idle("")), @"
    error: recipe `[DIR]/r.wasm` failed before the first step
    cause: it returned without taking a step, so nothing is trained
    hint: take steps until `run.next_step()` gives none
    ");
}

#[test]
fn space() {
    assert_snapshot!(report(&idle("(memory 16384)")), @"
    error: recipe `[DIR]/r.wasm` failed before the first step
    cause: the guest asked for 1025 MiB of memory, and its limit is 64 MiB
    cause: memory minimum size of 16384 pages exceeds memory limits
    hint: `limits.memory_mb` raises the limit
    ");
    assert_snapshot!(report(&idle("(memory 600) (memory 600)")), @"
    error: recipe `[DIR]/r.wasm` failed before the first step
    cause: the guest asked for 76 MiB of memory, and its limit is 64 MiB
    cause: memory minimum size of 600 pages exceeds memory limits
    hint: `limits.memory_mb` raises the limit
    ");
    assert_snapshot!(report(&idle(&"(memory 1)".repeat(4))), @"
    error: recipe `[DIR]/r.wasm` failed before the first step
    cause: resource limit exceeded: memory count too high at 6
    hint: `limits.memories` raises the limit
    ");
    assert_snapshot!(report(&idle("(table 10000000 funcref)")), @"
    error: recipe `[DIR]/r.wasm` failed before the first step
    cause: table minimum size of 10000000 elements exceeds table limits
    hint: `limits.table_elements` raises the limit
    ");
    assert_snapshot!(report(&idle(&"(table 1 funcref)".repeat(33))), @"
    error: recipe `[DIR]/r.wasm` failed before the first step
    cause: resource limit exceeded: table count too high at 33
    hint: `limits.tables` raises the limit
    ");
    let grows = r#"(table $t 1 funcref) (func (export "main") (result i32)
        (loop (br_if 0 (i32.ne (i32.const -1) (table.grow $t (ref.null func) (i32.const 1000))))) unreachable)"#;
    assert_snapshot!(report(&recipe(grows)), @"
    error: recipe `[DIR]/r.wasm` failed before the first step
    cause: the guest stopped itself (`unreachable`)
    hint: an exception that a JavaScript or Python guest does not catch ends so: catch it, and give back a failure
    ");
    let modules = format!("(core module $e) (core module $m (memory (export \"memory\") 1) {IDLE})");
    let instances = format!("{}(core instance $i (instantiate $m))", "(core instance (instantiate $e))".repeat(80));
    assert_snapshot!(report(&component(&modules, &instances)), @"
    error: recipe `[DIR]/r.wasm` failed before the first step
    cause: resource limit exceeded: instance count too high at 65
    hint: `limits.instances` raises the limit
    ");
}

#[test]
fn time() {
    assert_snapshot!(report(&idle("(func $s (loop (br 0))) (start $s)")), @"
    error: recipe `[DIR]/r.wasm` failed before the first step
    cause: the guest computed for more than 0.4 s without a turn of its loop
    cause: in `s`
    hint: look for a loop that does not end; work on many numbers belongs into tensor operations
    ");
    assert_snapshot!(report(&recipe(r#"(func $f (call $f)) (func (export "main") (result i32) (call $f) unreachable)"#)), @"
    error: recipe `[DIR]/r.wasm` failed before the first step
    cause: its calls went too deep for the stack
    cause: in `f`
    ");
    // A copy of much memory is one instruction, at which no clock is read.
    let copies = r#"(memory $big 800) (func (export "main") (result i32)
        (loop (memory.fill $big (i32.const 0) (i32.const 1) (i32.const 52428800)) (br 0)) unreachable)"#;
    assert_snapshot!(report(&recipe(copies)), @"
    error: recipe `[DIR]/r.wasm` failed before the first step
    cause: the guest computed for more than 0.4 s without a turn of its loop
    hint: look for a loop that does not end; work on many numbers belongs into tensor operations
    ");
}

#[test]
fn what_is_handed_over() {
    let logs = |from: i64, length: i64| {
        let log = format!("(call $log (i32.const {from}) (i32.const {length}))");
        report(&component(
            &format!(
                r#"(core module $m (import "host" "log" (func $log (param i32 i32)))
                    (import "libc" "memory" (memory 1)) (export "memory" (memory 0))
                    (func (export "main") (result i32)
                        (drop (memory.grow (i32.const 800))) (i32.store (i32.const 0) (i32.const 0xff)) {log} (i32.const 8)))"#
            ),
            r#"(core instance $i (instantiate $m
                (with "host" (instance (export "log" (func $log)))) (with "libc" (instance $libc))))"#,
        ))
    };
    assert_snapshot!(logs(0, 50_000_000), @"
    error: recipe `[DIR]/r.wasm` failed before the first step
    cause: too much data is being copied between the host and the guest: fuel allocated for hostcalls has been exhausted
    hint: `limits.hostcall_mb` raises the limit
    ");
    assert_snapshot!(logs(0, 4_000_000_000), @"
    error: recipe `[DIR]/r.wasm` failed before the first step
    cause: what it hands over does not read as the SDK's types
    cause: string pointer/length out of bounds of memory
    hint: make it with the SDK, or with tools that read `sdk/wit`
    ");
    assert_snapshot!(logs(-1, 1), @"
    error: recipe `[DIR]/r.wasm` failed before the first step
    cause: what it hands over does not read as the SDK's types
    cause: string pointer/length out of bounds of memory
    hint: make it with the SDK, or with tools that read `sdk/wit`
    ");
    assert_snapshot!(logs(0, 1), @"
    error: recipe `[DIR]/r.wasm` failed before the first step
    cause: what it hands over does not read as the SDK's types
    cause: invalid utf-8 sequence of 1 bytes from index 0
    hint: make it with the SDK, or with tools that read `sdk/wit`
    ");
    // Where its result lies.
    let gives = |place: &str| report(&recipe(&format!(r#"(func (export "main") (result i32) (i32.const {place}))"#)));
    assert_snapshot!(gives("-4"), @"
    error: recipe `[DIR]/r.wasm` failed before the first step
    cause: what it hands over does not read as the SDK's types
    cause: pointer out of bounds of memory
    hint: make it with the SDK, or with tools that read `sdk/wit`
    ");
    assert_snapshot!(gives("1"), @"
    error: recipe `[DIR]/r.wasm` failed before the first step
    cause: what it hands over does not read as the SDK's types
    cause: return pointer not aligned
    hint: make it with the SDK, or with tools that read `sdk/wit`
    ");
    let wrong = r#"(func (export "main") (result i32) (i32.store8 (i32.const 0) (i32.const 7)) (i32.const 0))"#;
    assert_snapshot!(report(&recipe(wrong)), @"
    error: recipe `[DIR]/r.wasm` failed before the first step
    cause: what it hands over does not read as the SDK's types
    cause: invalid expected discriminant
    hint: make it with the SDK, or with tools that read `sdk/wit`
    ");
}

/// A number that is no handle of this guest's.
#[test]
fn handles() {
    let import = format!(
        r#"(import "host:sdk/tensors@{SDK_VERSION}" (instance $tensors
            (export "tensor" (type $tensor (sub resource)))
            (export "[method]tensor.shape" (func (param "self" (borrow $tensor)) (result (list s64))))))
        (core func $shape (canon lower (func $tensors "[method]tensor.shape") (memory $libc "memory") (realloc (func $libc "realloc"))))
        (alias export $tensors "tensor" (type $t))
        (core func $drop (canon resource.drop $t))"#
    );
    let guest = |body: &str| {
        let module = format!(
            r#"{import} (core module $m (import "host" "shape" (func $shape (param i32 i32)))
                (import "host" "drop" (func $drop (param i32)))
                (memory (export "memory") 1) (func (export "main") (result i32) {body} (i32.const 8)))"#
        );
        let text = component(
            &module,
            r#"(core instance $i (instantiate $m
                (with "host" (instance (export "shape" (func $shape)) (export "drop" (func $drop))))))"#,
        );
        report(&text.replace(
            r#"(memory (export "memory") 1 1000)"#,
            r#"(memory (export "memory") 1 1000)
               (func (export "realloc") (param i32 i32 i32 i32) (result i32) (i32.const 64))"#,
        ))
    };
    assert_snapshot!(guest("(call $shape (i32.const 12345) (i32.const 0))"), @"
    error: recipe `[DIR]/r.wasm` failed before the first step
    cause: unknown handle index 12345
    ");
    assert_snapshot!(guest("(call $shape (i32.const 0) (i32.const 0))"), @"
    error: recipe `[DIR]/r.wasm` failed before the first step
    cause: unknown handle index 0
    ");
    assert_snapshot!(guest("(call $drop (i32.const 1))"), @"
    error: recipe `[DIR]/r.wasm` failed before the first step
    cause: unknown handle index 1
    ");
}

#[test]
fn what_the_engine_is_not_asked_for() {
    assert_snapshot!(report(&idle("(memory 1 1 shared)")), @"
    error: cannot compile `[DIR]/r.wasm`
    cause: failed to parse WebAssembly module: threads must be enabled for shared memories (at offset 0x14f)
    ");
    assert_snapshot!(report(&idle("(memory i64 1)")), @"
    error: cannot compile `[DIR]/r.wasm`
    cause: failed to parse WebAssembly module: memory64 must be enabled for 64-bit memories (at offset 0x14f)
    ");
    assert_snapshot!(report(&idle("(memory 1 (pagesize 1))")), @"
    error: cannot compile `[DIR]/r.wasm`
    cause: failed to parse WebAssembly module: the custom page sizes proposal must be enabled to customize a memory's page size (at offset 0x14f)
    ");
    assert_snapshot!(report(&idle("(type (struct (field i32)))")), @"
    error: cannot compile `[DIR]/r.wasm`
    cause: failed to parse WebAssembly module: struct indexed types not supported without the gc feature (at offset 0x142)
    ");
    assert_snapshot!(report(&idle("(tag)")), @"
    error: cannot compile `[DIR]/r.wasm`
    cause: failed to parse WebAssembly module: exceptions proposal not enabled (at offset 0x154)
    ");
    assert_snapshot!(report(&idle("(func $f (return_call $f))")), @"
    error: cannot compile `[DIR]/r.wasm`
    cause: failed to compile: wasm[1]::function[0]::f: WebAssembly translation error: Invalid input WebAssembly code at offset 363: tail calls support is not enabled
    ");
    assert_snapshot!(report(&idle("(func (drop (i32x4.relaxed_trunc_f32x4_s (v128.const i32x4 0 0 0 0))))")), @"
    error: cannot compile `[DIR]/r.wasm`
    cause: failed to compile: wasm[1]::function[0]: WebAssembly translation error: Invalid input WebAssembly code at offset 381: relaxed SIMD support is not enabled
    ");
    let asynchronous = idle("").replacen("(component", "(component (core func (canon backpressure.inc))", 1);
    assert_snapshot!(report(&asynchronous), @"
    error: cannot compile `[DIR]/r.wasm`
    cause: failed to parse WebAssembly module: `backpressure.inc` requires the component model async feature (at offset 0xb)
    ");
}

#[test]
fn what_is_not_to_be_had() {
    let wants = |name: &str| {
        let text = component(
            &format!("(core module $m (memory (export \"memory\") 1) {IDLE})"),
            "(core instance $i (instantiate $m))",
        );
        report(&text.replace("(component", &format!("(component (import \"{name}\" (instance))")))
    };
    assert_snapshot!(wants("wasi:sockets/tcp@0.2.6"), @"
    error: the recipe `[DIR]/r.wasm` wants `wasi:sockets/tcp`, which guests do not get
    hint: a guest has no network
    ");
    assert_snapshot!(wants("wasi:http/outgoing-handler@0.2.6"), @"
    error: the recipe `[DIR]/r.wasm` wants `wasi:http/outgoing-handler`, which guests do not get
    hint: a guest has no network
    ");
    assert_snapshot!(wants("wasi:filesystem/preopens@0.2.6"), @"
    error: the recipe `[DIR]/r.wasm` wants `wasi:filesystem/preopens`, which guests do not get
    hint: a guest has no files: remove what uses `std::fs`; data comes as rows, settings from the config
    ");
    assert_snapshot!(wants("wasi:random/random@0.2.6"), @"
    error: the recipe `[DIR]/r.wasm` wants `wasi:random/random`, which guests do not get
    hint: a guest has no random numbers, so that a run can be repeated
    ");
    assert_snapshot!(wants("wasi:clocks/monotonic-clock@0.2.6"), @"
    error: the recipe `[DIR]/r.wasm` wants `wasi:clocks/monotonic-clock`, which guests do not get
    hint: a guest has no clock: remove what uses `std::time`; the host measures and logs time
    ");
    assert_snapshot!(wants("host:sdk/secrets@0.1.0"), @"
    error: the recipe `[DIR]/r.wasm` wants `host:sdk/secrets`, which guests do not get
    hint: a guest may import `host:sdk` only
    ");
    assert_snapshot!(wants("someone:else/exec"), @"
    error: the recipe `[DIR]/r.wasm` wants `someone:else/exec`, which guests do not get
    hint: a guest may import `host:sdk` only
    ");
}

/// Names reach the terminal, and are a stranger's.
#[test]
fn names() {
    let named = r#"(func $f (@name "\1b[2J\0aerror: forged") unreachable) (func (export "main") (result i32) (call $f) unreachable)"#;
    assert_snapshot!(report(&recipe(named)), @"
    error: recipe `[DIR]/r.wasm` failed before the first step
    cause: the guest stopped itself (`unreachable`)
    cause: in `�[2J�error: forged`
    hint: an exception that a JavaScript or Python guest does not catch ends so: catch it, and give back a failure
    ");
    let wants = idle("").replacen("(component", r#"(component (import "\1b[2J\0aforged" (func))"#, 1);
    assert_snapshot!(report(&wants), @"
    error: the recipe `[DIR]/r.wasm` wants `�[2J�forged`, which guests do not get
    hint: a guest may import `host:sdk` only
    ");
    assert_snapshot!(report(r#"(component (import "a" (func)) (export "\1b[2J\0aforged" (func 0)))"#), @"
    error: the component `[DIR]/r.wasm` is not a recipe of host:sdk
    cause: it exports `�[2J�forged`, not `main`
    hint: a recipe in Rust ends with `host_sdk::recipe!(…)`
    ");
}

#[test]
fn what_is_no_recipe() {
    assert_snapshot!(report("(component)"), @"
    error: the component `[DIR]/r.wasm` is not a recipe of host:sdk
    cause: it exports nothing, not `main`
    hint: a recipe in Rust ends with `host_sdk::recipe!(…)`
    ");
    let other_type = r#"(component (core module $m (func (export "main"))) (core instance $i (instantiate $m))
        (func (export "main") (canon lift (core func $i "main"))))"#;
    assert_snapshot!(report(other_type), @"
    error: `[DIR]/r.wasm` does not fit this host's host:sdk 0.1.0
    cause: type-checking export func `main`: expected 1-tuple, found 0-tuple
    hint: build it again with the `host-sdk` of this host, or take a later host
    ");
    assert_snapshot!(of_bytes(&nested(100_000)), @"
    error: the recipe `[DIR]/r.wasm` is too deep to be compiled
    cause: 100000 components are in each other, and 32 may be
    ");
    // One in a recipe, which would be compiled.
    let mut deep = wat::parse_str(idle("")).unwrap();
    let inner = nested(100_000);
    deep.extend([4].into_iter().chain(leb(inner.len())));
    deep.extend(inner);
    assert_snapshot!(of_bytes(&deep), @"
    error: the recipe `[DIR]/r.wasm` is too deep to be compiled
    cause: 100001 components are in each other, and 32 may be
    ");
    // Native code of the engine's own making, renamed.
    let engine = host_rank::script::wasm::engine().unwrap();
    let native = engine.precompile_component(&wat::parse_str(idle("")).unwrap()).unwrap();
    assert_snapshot!(of_bytes(&native), @"
    error: the recipe `[DIR]/r.wasm` is neither a Wasm component nor a Rhai script
    hint: name a file that `host ls` lists, or build one with `cargo build --target wasm32-wasip2`
    ");
    assert_snapshot!(of_bytes(b""), @"error: the recipe `[DIR]/r.wasm` is empty");
    assert_snapshot!(of_bytes(b"\0asm"), @"
    error: the recipe `[DIR]/r.wasm` is not a Wasm component
    cause: unexpected end-of-file (at offset 0x4)
    ");
    assert_snapshot!(of_bytes(b"\0asm\x0d\0\x01\0\xff\xff\xff\xff\xff"), @"
    error: the recipe `[DIR]/r.wasm` is not a Wasm component
    cause: it is cut short or damaged: malformed section id (at offset 0x8)
    ");
}

/// A number in the five bytes of a LEB128.
fn leb(number: usize) -> [u8; 5] {
    std::array::from_fn(|at| (number >> (7 * at)) as u8 & 0x7f | if at < 4 { 0x80 } else { 0 })
}

/// A component in a component in a component.
fn nested(levels: usize) -> Vec<u8> {
    const HEADER: &[u8] = b"\0asm\x0d\0\x01\0";
    // From the inside out, and back to front.
    let mut reversed: Vec<u8> = HEADER.iter().rev().copied().collect();
    for _ in 0..levels {
        let length = leb(reversed.len());
        reversed.extend(length.iter().rev());
        reversed.push(4);
        reversed.extend(HEADER.iter().rev());
    }
    reversed.reverse();
    reversed
}

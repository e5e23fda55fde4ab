//! What the lock file must say.

/// Below this, advisories about what guests can do concern us. The features `gc` and `threads`, compiled in and switched off,
/// are there because 48.0.8 has a defect in builds without them; from 48.0.9 on they may go.
const LEAST: [u32; 3] = [48, 0, 8];

#[test]
fn wasmtime_is_new_enough() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let lock = std::fs::read_to_string(root.join("Cargo.lock")).unwrap();
    let manifest = std::fs::read_to_string(root.join("Cargo.toml")).unwrap();
    for name in ["wasmtime", "wasmtime-wasi", "wasmtime-wasi-io"] {
        let (_, after) = lock.split_once(&format!("name = \"{name}\"\nversion = \"")).unwrap();
        let version: Vec<u32> = after.split('"').next().unwrap().split('.').map(|part| part.parse().unwrap()).collect();
        assert!(version >= LEAST.to_vec(), "{name} {version:?}");
        // The long-term branch, and not one that another rustc is needed for.
        assert_eq!(version[0], LEAST[0], "{name} {version:?}");
        if version < vec![48, 0, 9] {
            let line = manifest.lines().find(|line| line.starts_with("wasmtime = ")).unwrap();
            assert!(line.contains("\"gc\"") && line.contains("\"threads\""), "{line}");
        }
    }
}

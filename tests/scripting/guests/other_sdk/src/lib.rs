//! A recipe of another SDK version.

wit_bindgen::generate!({
    inline: "
        package host:sdk@0.0.1;
        interface types { log: func(message: string); }
        world recipe { import types; export main: func() -> result<_, string>; }
    "
});

struct Recipe;

impl Guest for Recipe {
    fn main() -> Result<(), String> {
        host::sdk::types::log("hello");
        Ok(())
    }
}

export!(Recipe);

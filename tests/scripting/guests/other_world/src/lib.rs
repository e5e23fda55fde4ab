//! A component of another world.

wit_bindgen::generate!({ inline: "package other:things@1.0.0; world thing { export hello: func() -> string; }" });

struct Thing;

impl Guest for Thing {
    fn hello() -> String {
        "hello".into()
    }
}

export!(Thing);

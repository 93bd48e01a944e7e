//! The door before a real server, with a real client.

use std::io;
use std::time::Duration;

use shoal_door::{Door, Limits};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tonic::codegen::{Service as _, http};
use tonic::service::Routes;
use tonic::transport::{Endpoint, Server};

#[tokio::test]
async fn a_client_gets_through_a_crowd_that_greets_and_never_calls() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("an address");
    let limits = Limits {
        greeting: Duration::from_secs(60),
        of_one: 4,
        of_all: 100,
    };
    let server = Server::builder().add_routes(Routes::default());
    tokio::spawn(server.serve_with_incoming(Door::new(listener, limits)));
    let mut crowd = Vec::new();
    for _ in 0..limits.of_one {
        let mut stream = TcpStream::connect(address).await.expect("connected");
        let greeting = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
        stream.write_all(greeting).await.expect("sent");
        // The server's settings: it has taken this one in.
        stream.read_exact(&mut [0; 9]).await.expect("answered");
        crowd.push(stream);
    }
    let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an endpoint");
    let mut client = endpoint.connect().await.expect("connected");
    let call = http::Request::post(format!("http://{address}/no/such"));
    let call = call.body(tonic::body::Body::empty()).expect("a call");
    std::future::poll_fn(|context| client.poll_ready(context))
        .await
        .expect("ready");
    let answer = client.call(call).await.expect("answered");
    assert_eq!(answer.status(), http::StatusCode::OK);
    assert_eq!(answer.headers()["grpc-status"], "12");
    let end = crowd[0].read_to_end(&mut Vec::new()).await;
    let closed = end.is_ok() || end.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset);
    assert!(closed, "the oldest went");
}

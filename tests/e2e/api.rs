//! The gRPC API explains itself: reflection and health, for grpcurl and for load balancers.

use shoal_tests::cluster::{Cluster, Shape};
use shoal_tests::machine::Machine;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::{v1, v1alpha};

#[test]
fn the_cluster_api_has_reflection_and_health() {
    let cluster = Cluster::start(Machine::shared(), &Shape::default());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let endpoint = cluster.shoal.endpoint().to_owned();
        let channel = Channel::from_shared(endpoint)
            .expect("an endpoint")
            .connect()
            .await
            .expect("connected");

        let names = service_names(channel.clone()).await;
        assert!(
            names.iter().any(|name| name == "shoal.cluster.v1.Cluster"),
            "{names:?}"
        );
        assert!(describes_migrate_vm(channel.clone()).await);

        let mut health = HealthClient::new(channel);
        for service in ["", "shoal.cluster.v1.Cluster"] {
            let answer = health
                .check(HealthCheckRequest {
                    service: service.into(),
                })
                .await
                .expect("an answer");
            assert_eq!(
                answer.into_inner().status(),
                ServingStatus::Serving,
                "'{service}'"
            );
        }
    });
}

async fn service_names(channel: Channel) -> Vec<String> {
    use v1::server_reflection_client::ServerReflectionClient;
    use v1::server_reflection_request::MessageRequest;
    use v1::server_reflection_response::MessageResponse;

    let request = v1::ServerReflectionRequest {
        message_request: Some(MessageRequest::ListServices(String::new())),
        ..Default::default()
    };
    let mut client = ServerReflectionClient::new(channel);
    let answer = client.server_reflection_info(tokio_stream::once(request)).await;
    let mut answers = answer.expect("an answer").into_inner();
    let message = answers.message().await.expect("a message").expect("one");
    match message.message_response {
        Some(MessageResponse::ListServicesResponse(list)) => {
            list.service.into_iter().map(|s| s.name).collect()
        }
        other => panic!("not a list of services: {other:?}"),
    }
}

/// By the version of reflection that Python's and most graphical clients speak.
async fn describes_migrate_vm(channel: Channel) -> bool {
    use v1alpha::server_reflection_client::ServerReflectionClient;
    use v1alpha::server_reflection_request::MessageRequest;
    use v1alpha::server_reflection_response::MessageResponse;

    let symbol = "shoal.cluster.v1.Cluster.MigrateVm".to_owned();
    let request = v1alpha::ServerReflectionRequest {
        message_request: Some(MessageRequest::FileContainingSymbol(symbol)),
        ..Default::default()
    };
    let mut client = ServerReflectionClient::new(channel);
    let answer = client.server_reflection_info(tokio_stream::once(request)).await;
    let mut answers = answer.expect("v1alpha is served").into_inner();
    let message = answers.message().await.expect("a message").expect("one");
    let Some(MessageResponse::FileDescriptorResponse(files)) = message.message_response else {
        return false;
    };
    let has = |file: &[u8]| file.windows(9).any(|name| name == b"MigrateVm");
    files.file_descriptor_proto.iter().any(|file| has(file))
}
